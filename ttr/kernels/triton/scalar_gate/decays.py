"""Log decays summed inside every chunk, and back: the gradient of the log decay from what flows past it."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import LEAST_LOG_DECAY, LOG2E, load_block, locate, sequence


@kernel("N T decay_stride")
def cumulate_kernel(
    log_decay, decays, bounds, cu_seqlens, N, T, decay_stride,
    HV: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, ERASE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """decays: [events, Hv], the log2 of what is left of a chunk's start after each event. One chunk a program.

    A token decays before the first of its STEPS events, and before no other.

    bounds: [chunks, Hv], the same after the last one (with ERASE there is more to it: `inverse_kernel`).
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED, STEPS)
    first, length = sequence(cu_seqlens, n, T, PACKED, STEPS)
    i = tl.arange(0, C)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    valid = (chunk * C + i < length)[:, None] & (heads < HV)[None, :]
    event = first + chunk * C
    if STEPS == 1:
        x = tl.load(log_decay + event * decay_stride + i[:, None] * decay_stride + heads[None, :], mask=valid, other=0.0)
    else:
        token = ((event + i) // STEPS)[:, None]
        decays_here = valid & ((event + i) % STEPS == 0)[:, None]
        x = tl.load(log_decay + token * decay_stride + heads[None, :], mask=decays_here, other=0.0)
    x = tl.maximum(x.to(tl.float32), LEAST_LOG_DECAY)
    if WIDE:
        x = x.to(tl.float64)
    tl.store(decays + (event + i[:, None]) * HV + heads[None, :], tl.cumsum(x * LOG2E, 0), mask=valid)
    if not ERASE:
        tl.store(bounds + tl.program_id(0).to(tl.int64) * HV + heads, tl.sum(x * LOG2E, 0).to(tl.float32), mask=heads < HV)


@triton.jit
def sum_of_tiles(base, events, at, valid, HV: tl.constexpr, TILES: tl.constexpr):
    """[events, heads] of [tiles, events, Hv]."""
    between = events.to(tl.int64) * HV
    total = tl.load(base + at, mask=valid, other=0.0)
    for tile in tl.static_range(1, TILES):
        total += tl.load(base + tile * between + at, mask=valid, other=0.0)
    return total


@triton.jit
def sum_of_asked(asked, events, event, heads, valid, HV: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr, READ_BEFORE: tl.constexpr):
    """[events, heads] of [tiles, tokens, Hv]: each token's at the event it reads at, elsewhere 0."""
    READ: tl.constexpr = (STEPS - 1) * (not READ_BEFORE)
    at = (event // STEPS)[:, None] * HV + heads[None, :]
    return sum_of_tiles(asked, events // STEPS, at, valid & (event % STEPS == READ)[:, None], HV, TILES)


@kernel("N T events")
def decay_gradient_kernel(
    taken, unseen, asked, given, leaving, carried, at_start, dlog_decay, cu_seqlens, N, T, events,
    HV: tl.constexpr, READERS: tl.constexpr, WRITERS: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
    EVERY: tl.constexpr, ERASE: tl.constexpr, STARTED: tl.constexpr, UNSEEN: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dlog_decay = what is read from an event on (after its own decay) of what was written before it. A block a program.

    Events from one on take (taken, asked, of `readers`) of all before them; what they take of each other is known as given (of
    `keys`: the same numbers, rounded the same, so a strong gate's small gradient is left). Out of the chunk: leaving. Past
    it as a whole: carried, known for the last chunk of every block. What passes the chunks before that follows from what enters
    and leaves between; at the block's begin it must come to what the block before it knows (at_start: [N, Hv], <S, D> of the
    initial state). What it misses by is rounding, and is spread over the chunks.
    """
    slot = tl.program_id(0)
    n, block = locate(cu_seqlens, slot, N, T, C * EVERY, PACKED, STEPS)
    first, length = sequence(cu_seqlens, n, T, PACKED, STEPS)
    begin = block * (C * EVERY)
    if begin >= length:
        return
    chunks = tl.minimum(tl.cdiv(length - begin, C), EVERY)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    i = tl.arange(0, C * EVERY)
    inside = heads < HV
    valid = (begin + i < length)[:, None] & inside[None, :]
    event = first + begin + i
    at = event[:, None] * HV + heads[None, :]
    if STEPS == 1:
        net = sum_of_tiles(taken, events, at, valid, HV, READERS)
    else:
        net = sum_of_asked(asked, events, event, heads, valid, HV, READERS, STEPS, READ_BEFORE)
        if ERASE:
            net += sum_of_tiles(taken, events, at, valid, HV, READERS)
    net -= sum_of_tiles(given, events, at, valid, HV, WRITERS)
    away = sum_of_tiles(leaving, events, at, valid, HV, WRITERS)
    last = (i >= (chunks - 1) * C)[:, None]  # of the last chunk, which nothing leaves that the block knows of
    net -= tl.where(last, 0.0, away)
    away = tl.where(last, away, 0.0)
    j = tl.arange(0, C)
    before = (first + begin - C + j)[:, None] * HV + heads[None, :]  # the chunk before is whole
    entered = sum_of_tiles(leaving, events, before, (j < C)[:, None] & inside[None, :] & (block > 0), HV, WRITERS)
    past = tl.load(carried + slot.to(tl.int64) * HV + heads, mask=inside, other=0.0)
    missed = past + tl.sum(net, 0) - tl.sum(entered, 0)
    if block > 0:
        missed -= tl.load(carried + (slot - 1).to(tl.int64) * HV + heads, mask=inside, other=0.0)
    elif STARTED:
        missed -= tl.load(at_start + n * HV + heads, mask=inside, other=0.0)
    dg = tl.cumsum(net, 0, reverse=True) + (tl.cumsum(away, 0) - away)
    dg += past[None, :] - (missed / chunks)[None, :] * (chunks - 1 - i // C)[:, None]
    if UNSEEN:
        dg -= sum_of_tiles(unseen, events, at, valid, HV, READERS)
    if STEPS == 1:
        tl.store(dlog_decay + at, dg, mask=valid)
    else:
        if READ_BEFORE:
            dg -= sum_of_asked(asked, events, event, heads, valid, HV, READERS, STEPS, READ_BEFORE)
        token = (event // STEPS)[:, None] * HV + heads[None, :]
        tl.store(dlog_decay + token, dg, mask=valid & (event % STEPS == 0)[:, None])


@kernel("N T")
def carried_kernel(
    states, gradients, decays, carried, cu_seqlens, N, T,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
    EVERY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """carried: [blocks, Hv], what passes the whole last chunk of every block: decay <S before it, D behind it>."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, block = locate(cu_seqlens, slot, N, T, C * EVERY, PACKED, STEPS)
    first, length = sequence(cu_seqlens, n, T, PACKED, STEPS)
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
