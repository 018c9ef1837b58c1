"""The scan over chunks: the Gram matrix H before each of them, and behind the last."""

import triton.language as tl

from ..launch import kernel
from ..least_squares.scaled import power_below
from ..least_squares.statistics import ROOM
from ..tiles import first_slot, load_block, load_numbers, scanned, states_of, tokens_of


@kernel("blocks T segments segment_chunks")
def gram_kernel(
    writes, added, gains, left, middles, start, states, sizes, plain, last, transfer, cu_seqlens, blocks, T, segments, segment_chunks,
    HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, STARTED: tl.constexpr, LOCAL: tl.constexpr,
    PACKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of columns of one head over one segment: H <- left H left + writes^T (added writes).

    start, last: [N, segments, Hv, dk, dk], float32. states: [chunks, Hv, dk, dk], middles H middles / size; sizes: [chunks, Hv]; no
    entry is larger than the trace, which a size brings to ROOM. plain: H as it is, or None.
    LOCAL: from H = 0, nothing but `last` and the segment's decays, transfer [N, segments, Hv, dk].
    """
    TILES: tl.constexpr = (DK + TILE - 1) // TILE
    tile, segment, n, head, first, length, chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED
    )
    slot = first_slot(cu_seqlens, n, T, C, PACKED)
    rows = tokens_of(writes, first, head, length, HV, DK, C, BK)
    columns = tokens_of(writes, first, head, length, HV, DK, C, TILE)
    keys = tl.arange(0, BK)
    values = tile * TILE + tl.arange(0, TILE)
    i = tl.arange(0, C)
    state = tl.zeros([BK, TILE], tl.float32)
    diagonal = tl.zeros([BK], tl.float32)
    kept = tl.zeros([BK], tl.float32) + 1.0
    if not LOCAL:
        scaled = states_of(states, blocks * HV, DK, DK, BK, TILE)
        if plain is not None:
            unscaled = states_of(plain, blocks * HV, DK, DK, BK, TILE)
    if STARTED:
        state = load_block(start + place * DK * DK, keys, values, DK, DK)
        diagonal = tl.abs(tl.load(start + place * DK * DK + keys * (DK + 1), mask=keys < DK, other=0.0))

    for chunk in range(begin, end):
        at = (slot + chunk) * HV + head
        here = at.to(tl.int64) * DK
        token = first + chunk * C
        whole = tl.load(left + here + keys, mask=keys < DK, other=0.0)
        whole_of_tile = tl.load(left + here + values, mask=values < DK, other=0.0)
        b = load_numbers(added, head, token, i, chunk * C + i < length, HV, 0.0, True)
        if LOCAL:
            kept *= whole
        else:
            middle = tl.load(middles + here + keys, mask=keys < DK, other=0.0)
            middle_of_tile = tl.load(middles + here + values, mask=values < DK, other=0.0)
            power = power_below(tl.sum(diagonal * middle * middle, 0)) * ROOM
            seen = state * ((middle * power)[:, None] * middle_of_tile[None, :])
            scaled.store([at, 0, tile * TILE], tl.reshape(seen.to(OPERAND), [1, BK, TILE]))
            if plain is not None:
                unscaled.store([at, 0, tile * TILE], tl.reshape(state.to(plain.dtype.element_ty), [1, BK, TILE]))
            if tile == 0:
                tl.store(sizes + at, 1.0 / power)
            diagonal = diagonal * whole * whole + tl.load(gains + here + keys, mask=keys < DK, other=0.0)
        power = power_below(tl.max(tl.abs(b), 0))
        write = (columns.load([chunk * C, tile * TILE]).to(tl.float32) * (b * power)[:, None]).to(OPERAND)
        new = tl.dot(tl.trans(rows.load([chunk * C, 0])), write, input_precision=PRECISION)
        state = state * (whole[:, None] * whole_of_tile[None, :]) + new * (1.0 / power)

    if LOCAL | ((end == chunks) & ((begin < chunks) | (segment == 0))):
        if LOCAL:
            base = last + place * DK * DK
        else:
            base = last + (n * HV + head).to(tl.int64) * DK * DK
        tl.store(base + keys[:, None] * DK + values[None, :], state, mask=(keys < DK)[:, None] & (values < DK)[None, :])
    if LOCAL and tile == 0:
        tl.store(transfer + place * DK + keys, kept, mask=keys < DK)
