"""Log decays summed inside every chunk, and back: the gradient of the log decay from what flows past it."""

import triton.language as tl

from ..launch import kernel
from ..tiles import first_slot, load_block, locate, sequence


@kernel("N T decay_stride")
def cumulate_kernel(
    log_decay, decays, cu_seqlens, N, T, decay_stride, HV: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """decays: [tokens, Hv], the log2 of what is left of a chunk's start after each token. One chunk a program."""
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    i = tl.arange(0, C)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    valid = (chunk * C + i < length)[:, None] & (heads < HV)[None, :]
    token = first + chunk * C
    x = tl.load(log_decay + token * decay_stride + i[:, None] * decay_stride + heads[None, :], mask=valid, other=0.0)
    x = tl.maximum(x.to(tl.float32), -110.0)
    if WIDE:
        x = x.to(tl.float64)
    tl.store(decays + (token + i[:, None]) * HV + heads[None, :], tl.cumsum(x * 1.4426950408889634, 0), mask=valid)


@kernel("N T tokens slots")
def decay_gradient_kernel(
    rows, columns, leaving, entering, carried, dlog_decay, cu_seqlens, N, T, tokens, slots,
    HV: tl.constexpr, TILES: tl.constexpr, KINDS: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dlog_decay_t = what is read from token t on (after its own decay) of what was written before it. One chunk a program.

    Inside the chunk: reads (rows) less what they took from the chunk itself (columns). From the chunk to later ones:
    leaving. Past the whole chunk: carried, known for the last chunk in EVERY and from there followed back, chunk by chunk,
    by what enters and leaves. KINDS: 1, or 2 with looks behind the reads.
    """
    slot = tl.program_id(0)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    chunks = tl.cdiv(length, C)
    if chunk >= chunks:
        return
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    i = tl.arange(0, C)
    inside = heads < HV
    valid = inside[None, :] & (chunk * C + i < length)[:, None]
    block = first_slot(cu_seqlens, n, T, C * EVERY, PACKED) + chunk // EVERY
    past = tl.load(carried + block.to(tl.int64) * HV + heads, mask=inside, other=0.0)
    away = tl.zeros([C, BH], tl.float32)
    after = tl.zeros([C, BH], tl.float32)  # counts from the token itself on
    later = tl.zeros([C, BH], tl.float32)  # counts from the next token on
    last = tl.minimum((chunk // EVERY + 1) * EVERY, chunks) - 1
    for tile in range(TILES):
        for c in range(chunk, last):  # whole chunks: the last of a block is never in here
            gone = leaving + (tile * tokens + first + c * C + i[:, None]) * HV + heads[None, :]
            past -= tl.sum(tl.load(gone, mask=inside[None, :] & (i < C)[:, None], other=0.0), 0)
        at = (tile * tokens + first + chunk * C + i[:, None]) * HV + heads[None, :]
        away += tl.load(leaving + at, mask=valid, other=0.0)
    for kind in tl.static_range(KINDS):
        for tile in range(kind * TILES, (kind + 1) * TILES):
            for c in range(chunk, last):
                entered = entering + (tile * slots + slot + c + 1 - chunk).to(tl.int64) * HV + heads
                past += tl.load(entered, mask=inside, other=0.0)
            at = (tile * tokens + first + chunk * C + i[:, None]) * HV + heads[None, :]
            after -= tl.load(columns + at, mask=valid, other=0.0)
            read = tl.load(rows + at, mask=valid, other=0.0)
            if LOOK_BEFORE if kind == 1 else READ_BEFORE:
                later += read
            else:
                after += read
    dg = tl.cumsum(after, 0, reverse=True) + tl.cumsum(away, 0) - away + past[None, :]
    if LOOK_BEFORE or READ_BEFORE:
        dg += tl.cumsum(later, 0, reverse=True) - later
    tl.store(dlog_decay + (first + chunk * C + i[:, None]) * HV + heads[None, :], dg, mask=valid)


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
