"""Device functions that every plan shares: where a program's tokens lie, tiles in and out, decays inside a chunk."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-126.0)  # log2 of float32's least normal number
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)
LEAST_LOG_DECAY = tl.constexpr(-110.0)  # exp of it is zero in float32; keeps -inf - (-inf) out of the differences


@triton.jit
def sequence(cu_seqlens, n, T, PACKED: tl.constexpr, STEPS: tl.constexpr = 1):
    """First token (int64) and length of sequence n, counted in events where a token is STEPS of them."""
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        return first * STEPS, (tl.load(cu_seqlens + n + 1) - first).to(tl.int32) * STEPS
    else:
        return n.to(tl.int64) * T * STEPS, T * STEPS


@triton.jit
def scanned(
    cu_seqlens, T, segments, segment_chunks,
    TILES: tl.constexpr, SKIPPED: tl.constexpr, HV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr = 1,
):  # fmt: skip
    """What a scan's program goes over; its grid is (sequences x value heads x TILES, segments but the first SKIPPED).

    The tile, the segment, the sequence and the head; the sequence's first event, length and chunks; the segment's first
    chunk and the one behind its last; the segment's place among all states.
    """
    tile = tl.program_id(0) % TILES
    segment = tl.program_id(1) + SKIPPED
    n = tl.program_id(0) // TILES // HV
    head = tl.program_id(0) // TILES % HV
    first, length = sequence(cu_seqlens, n, T, PACKED, STEPS)
    chunks = tl.cdiv(length, C)
    begin = segment * segment_chunks
    end = tl.minimum(begin + segment_chunks, chunks)
    return tile, segment, n, head, first, length, chunks, begin, end, (n.to(tl.int64) * segments + segment) * HV + head


@triton.jit
def first_slot(cu_seqlens, n, T, L: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr = 1):
    """Where the blocks of L events of sequence n begin among those of all sequences.

    floor(first / L) + n leaves room for every ceil(length / L) before it, so nobody has to count blocks on the host.
    """
    if PACKED:
        return tl.load(cu_seqlens + n).to(tl.int32) * STEPS // L + n
    else:
        return n * tl.cdiv(T * STEPS, L)


@triton.jit
def locate(cu_seqlens, slot, N, T, L: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr = 1):
    """The sequence a slot belongs to, and the block's place in it (it may lie behind the sequence's end)."""
    if PACKED:
        low = 0
        high = N
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle).to(tl.int32) * STEPS // L + middle <= slot:
                low = middle
            else:
                high = middle
        return low, slot - first_slot(cu_seqlens, low, T, L, PACKED, STEPS)
    else:
        blocks = tl.cdiv(T * STEPS, L)
        return slot // blocks, slot % blocks


@triton.jit
def tokens_of(base, first, head, length, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A head of one sequence of [tokens, HEADS, D] as a matrix, moved in tiles of [ROWS, COLUMNS]; zero outside of it."""
    return tl.make_tensor_descriptor(
        base + (first * HEADS + head) * D, shape=[length, D], strides=[HEADS * D, 1], block_shape=[ROWS, COLUMNS]
    )


@triton.jit
def load_rows(base, token, i, valid, columns, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """[C, BLOCK]: the tokens from `token` (int64) on of a matrix of D channels, a whole block of them or what is left of it.

    Zero where not valid and behind the last channel.
    """
    pointers = base + token * stride + i[:, None] * stride + columns[None, :]
    if BLOCK * (D // BLOCK) == D:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, token, x, i, valid, columns, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`."""
    pointers = base + token * stride + i[:, None] * stride + columns[None, :]
    if BLOCK * (D // BLOCK) == D:
        tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None])
    else:
        tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None] & (columns < D)[None, :])


@triton.jit
def store_pairs(base, token, head, x, i, valid, HEADS: tl.constexpr, C: tl.constexpr):
    """Write rows of C numbers as those of some tokens of [tokens, HEADS, C]."""
    pointers = base + (token * HEADS + head) * C + i[:, None] * (HEADS * C) + tl.arange(0, C)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None])


@triton.jit
def load_state(base, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """The transpose of a [dk, dv] state, [values, keys] in float32."""
    mask = (values < DV)[:, None] & (keys < DK)[None, :]
    return tl.load(base + keys[None, :] * DV + values[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(base, state, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """The inverse of `load_state`."""
    mask = (values < DV)[:, None] & (keys < DK)[None, :]
    tl.store(base + keys[None, :] * DV + values[:, None], state.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_numbers(base, head, token, i, valid, stride, other, NUMBERS: tl.constexpr):
    """One number a token, [C] in float32; `other` where not valid, and everywhere when there are none."""
    if NUMBERS:
        return tl.load(base + head + token * stride + i * stride, mask=valid, other=other).to(tl.float32)
    else:
        return tl.zeros_like(i).to(tl.float32) + other


@triton.jit
def load_decays(base, head, token, i, remaining, C: tl.constexpr, stride, GATED: tl.constexpr):
    """The summed log2 decays of a chunk: up to and with each token, before it, and of the whole chunk of `remaining` tokens."""
    if GATED:
        here = base + token * stride + head
        count = tl.minimum(remaining, C)
        whole = tl.load(here + (count - 1) * stride)
        inclusive = tl.load(here + i * stride, mask=i < count, other=0.0)
        before = tl.load(here + (i - 1) * stride, mask=(i > 0) & (i < count), other=0.0)
        inside = i < count
        return tl.where(inside, inclusive, whole), tl.where(inside, before, whole), whole
    else:
        zero = tl.zeros_like(i).to(tl.float32)
        return zero, zero, tl.sum(zero, 0)


@triton.jit
def store_bound(bounds, slot, head, squares, b, G, before, valid, HV: tl.constexpr, LOOK_BEFORE: tl.constexpr):
    """Write what `remembered` reads of a chunk with the delta rule: log2 of the norms of a_t (I - b_t k_t k_t^T), summed.

    squares: |k_t|^2. LOOK_BEFORE: of a_t I - b_t k_t k_t^T.
    """
    own = (G - before).to(tl.float32)
    erased = b * squares
    if LOOK_BEFORE:
        kept = tl.exp2(own)
        norm = tl.log2(tl.maximum(tl.maximum(kept, tl.abs(kept - erased), NAN_STAYS), 1e-38, NAN_STAYS))
    else:
        norm = own + tl.log2(tl.maximum(tl.abs(1.0 - erased), 1.0, NAN_STAYS))
    tl.store(bounds + slot.to(tl.int64) * HV + head, tl.sum(tl.where(valid, norm, 0.0), 0))


@triton.jit
def remembered(bounds, head, slot, chunks, HV: tl.constexpr, BACK: tl.constexpr):
    """How many of `chunks` chunks are felt at their end, counted from there, and log2 of what is left of all before them.

    Of the states that those before them leave, less than float32's least normal number is left; the local pass over a
    segment does not see them (nor a NaN among their values). BACK: felt at their begin, by their gradients.
    bounds: log2 of the most that a chunk leaves of a state; slot: the first chunk's place there.
    """
    i = tl.arange(0, 128)
    felt = 0
    left = 0.0
    for start in range(0, chunks, 128):
        step = start + i
        inside = step < chunks
        place = slot + (step if BACK else chunks - 1 - step)
        x = tl.load(bounds + place.to(tl.int64) * HV + head, mask=inside, other=0.0)
        between = left + tl.cumsum(x, 0) - x
        felt = tl.maximum(felt, tl.max(tl.where(inside & (between <= NOTHING), 0, tl.where(inside, step + 1, 0)), 0))
        left += tl.sum(x, 0)
    return felt, left


@triton.jit
def states_of(base, count, DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`count` states [dk, dv] one after another, moved in tiles of [1, ROWS, COLUMNS]."""
    return tl.make_tensor_descriptor(base, shape=[count, DK, DV], strides=[DK * DV, DV, 1], block_shape=[1, ROWS, COLUMNS])


@triton.jit
def load_block(base, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """A tile of a [dk, dv] state as it lies, [keys, values]: whole blocks of both, or what is left of them."""
    pointers = base + keys[:, None] * DV + values[None, :]
    if keys.shape[0] * (DK // keys.shape[0]) == DK and values.shape[0] * (DV // values.shape[0]) == DV:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(keys < DK)[:, None] & (values < DV)[None, :], other=0.0)


@triton.jit
def factor(exponent):
    """2^exponent in float32; exponents are never positive."""
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def pair_decay(later, earlier, i, j, STRICT: tl.constexpr):
    """What is left at row i of what row j wrote, 0 where i < j (STRICT: i <= j). later, i or earlier, j come broadcast."""
    if STRICT:
        allowed = i > j
    else:
        allowed = i >= j
    return factor(tl.where(allowed, later - earlier, float("-inf")))


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b accumulated in float32."""
    return tl.dot(a, b, input_precision=PRECISION)
