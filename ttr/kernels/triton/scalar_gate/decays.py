"""Log decays summed inside every chunk, and back: the gradient of the log decay from what flows past it."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import LEAST_LOG_DECAY, LOG2E, load_block, locate, sequence


@kernel("N T decay_stride")
def cumulate_kernel(
    log_decay, decays, bounds, cu_seqlens, N, T, decay_stride,
    HV: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """decays: [tokens, Hv], the log2 of what is left of a chunk's start after each token. One chunk a program.

    bounds: [chunks, Hv], the same after the last one (with ERASE there is more to it: `inverse_kernel`).
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    i = tl.arange(0, C)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    valid = (chunk * C + i < length)[:, None] & (heads < HV)[None, :]
    token = first + chunk * C
    x = tl.load(log_decay + token * decay_stride + i[:, None] * decay_stride + heads[None, :], mask=valid, other=0.0)
    x = tl.maximum(x.to(tl.float32), LEAST_LOG_DECAY)
    if WIDE:
        x = x.to(tl.float64)
    tl.store(decays + (token + i[:, None]) * HV + heads[None, :], tl.cumsum(x * LOG2E, 0), mask=valid)
    if not ERASE:
        tl.store(bounds + tl.program_id(0).to(tl.int64) * HV + heads, tl.sum(x * LOG2E, 0).to(tl.float32), mask=heads < HV)


@triton.jit
def sum_of_tiles(base, tokens, at, valid, HV: tl.constexpr, TILES: tl.constexpr):
    """[C, heads] of [tiles, tokens, Hv]."""
    between = tokens.to(tl.int64) * HV
    total = tl.load(base + at, mask=valid, other=0.0)
    for tile in tl.static_range(1, TILES):
        total += tl.load(base + tile * between + at, mask=valid, other=0.0)
    return total


@kernel("N T tokens")
def decay_gradient_kernel(
    taken, unseen, given, leaving, carried, at_start, dlog_decay, cu_seqlens, N, T, tokens,
    HV: tl.constexpr, READERS: tl.constexpr, WRITERS: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
    STARTED: tl.constexpr, UNSEEN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dlog_decay_t = what is read from token t on (after its own decay) of what was written before it. A block a program.

    Tokens from t on take (taken, of `readers`) of all before them; what they take of each other is known as given (of
    `keys`: the same numbers, rounded the same, so a strong gate's small gradient is left). Out of the chunk: leaving. Past
    it as a whole: carried, known for the last chunk of every block and followed back from there, chunk by chunk, by what
    enters and leaves. The walk must end at what the block before it knows (at_start: [N, Hv], <S, D> of the initial state);
    what it misses by is rounding, and is spread over its steps.
    """
    slot = tl.program_id(0)
    n, block = locate(cu_seqlens, slot, N, T, C * EVERY, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    chunks = tl.cdiv(length, C)
    begin = block * EVERY
    if begin >= chunks:
        return
    end = tl.minimum(begin + EVERY, chunks)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    i = tl.arange(0, C)
    inside = heads < HV
    past = tl.load(carried + slot.to(tl.int64) * HV + heads, mask=inside, other=0.0)
    missed = past
    if block > 0:
        missed -= tl.load(carried + (slot - 1).to(tl.int64) * HV + heads, mask=inside, other=0.0)
    elif STARTED:
        missed -= tl.load(at_start + n * HV + heads, mask=inside, other=0.0)
    for chunk in range(begin, end):
        valid = (chunk * C + i < length)[:, None] & inside[None, :]
        at = (first + chunk * C + i)[:, None] * HV + heads[None, :]
        missed += tl.sum(sum_of_tiles(taken, tokens, at, valid, HV, READERS) - sum_of_tiles(given, tokens, at, valid, HV, WRITERS), 0)
        earlier = (i < C)[:, None] & inside[None, :] & (chunk > 0)  # the chunk before is whole
        missed -= tl.sum(sum_of_tiles(leaving, tokens, at - C * HV, earlier, HV, WRITERS), 0)
    missed /= end - begin
    for step in range(0, end - begin):
        chunk = end - 1 - step
        valid = (chunk * C + i < length)[:, None] & inside[None, :]
        at = (first + chunk * C + i)[:, None] * HV + heads[None, :]
        net = sum_of_tiles(taken, tokens, at, valid, HV, READERS) - sum_of_tiles(given, tokens, at, valid, HV, WRITERS)
        away = sum_of_tiles(leaving, tokens, at, valid, HV, WRITERS)
        dg = tl.cumsum(net, 0, reverse=True) + tl.cumsum(away, 0) - away + (past - missed * step)[None, :]
        if UNSEEN:
            dg -= sum_of_tiles(unseen, tokens, at, valid, HV, READERS)
        past += tl.sum(net, 0)
        tl.store(dlog_decay + at, dg, mask=valid)
        earlier = (i < C)[:, None] & inside[None, :] & (chunk > 0)
        past -= tl.sum(sum_of_tiles(leaving, tokens, at - C * HV, earlier, HV, WRITERS), 0)


@kernel("N T")
def carried_kernel(
    states, gradients, decays, carried, cu_seqlens, N, T,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """carried: [blocks, Hv], what passes the whole last chunk of every block: decay <S before it, D behind it>."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, block = locate(cu_seqlens, slot, N, T, C * EVERY, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    chunks = tl.cdiv(length, C)
    if block * EVERY >= chunks:
        return
    last = tl.minimum((block + 1) * EVERY, chunks) - 1
    place = (slot.to(tl.int64) * HV + head) * DK * DV
    total = tl.zeros([BK], tl.float32)
    for start in range(0, DV, BV):
        values = start + tl.arange(0, BV)
        state = load_block(states + place, tl.arange(0, BK), values, DK, DV).to(tl.float32)
        total += tl.sum(state * load_block(gradients + place, tl.arange(0, BK), values, DK, DV).to(tl.float32), 1)
    end = first + tl.minimum((last + 1) * C, length) - 1
    tl.store(carried + slot * HV + head, tl.sum(total, 0) * tl.exp2(tl.load(decays + end * HV + head).to(tl.float32)))
