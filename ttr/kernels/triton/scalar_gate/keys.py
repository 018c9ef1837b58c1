"""The gradient of k as it writes: a scan from the last chunk to the first, a tile of key channels of D at a time.

dK = (U decay) D^T + (dO U^T * decay)^T Q,     D <- decay D + (decay Q)^T dO - (decay K)^T dV
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import factor, load_decays, load_numbers, load_rows, load_state, pair_decay, product, scanned, tokens_of
from .reading import only, read_decays, readers_of


@kernel("events T scale segments segment_chunks weight_stride")
def keys_kernel(
    q, k, error, dv, do, reads, decays, weight, end_gradient, dk, given, leaving, cu_seqlens,
    events, T, scale, segments, segment_chunks, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, STEPS: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, WEIGHTED: tl.constexpr,
    STARTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of key channels of one value head over one segment. dk: [events, Hv, dk], with ERASE added to what `readers`
    left there. reads: of `pairs_kernel`, with ERASE.

    STAGES: also for the loads that no product takes, or None to leave those alone.
    LEARNED: for the gradient of the log decay, partial sums per tile, [tiles, events, Hv]: what the reads inside the chunk
    take of every write (given) and what later chunks take of it (leaving).
    """
    TILES: tl.constexpr = (DK + BK - 1) // BK
    tile, _segment, _n, head, first, length, _chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED, STEPS
    )
    origin = first // STEPS
    queries = tokens_of(q, origin, head // (HV // H), length // STEPS, H, DK, R, BK)
    keys = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    outs = tokens_of(do, origin, head, length // STEPS, HV, DV, R, BV)
    errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    dks = tokens_of(dk, first, head, length, HV, DK, C, BK)
    if ERASE:
        read_pairs = tokens_of(reads, origin, head, length // STEPS, HV, C, R, C)
        values = tokens_of(dv, first, head, length, HV, DV, C, BV)
    between = events.to(tl.int64) * HV
    t = tl.arange(0, C)
    gradient = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        gradient = load_state(end_gradient + place * DK * DV, tile * BK + tl.arange(0, BK), tl.arange(0, BV), DK, DV)
    for step in tl.range(0, end - begin, num_stages=STAGES):
        chunk = end - 1 - step
        event = first + chunk * C
        valid = chunk * C + t < length
        here = (event + t) * HV + head
        row, at, reading = readers_of(chunk, length, C, R, STEPS, READ_BEFORE)
        query = queries.load([row, tile * BK])
        out = outs.load([row, 0])
        e = errors.load([chunk * C, 0])
        operand = query.dtype
        G, before, whole = load_decays(decays, head, event, t, length - chunk * C, C, HV, GATED)
        read = read_decays(decays, head, event, at, reading, G, before, HV, STEPS, GATED, READ_BEFORE)
        look = before if LOOK_BEFORE else G
        b = load_numbers(weight, head, event, t, valid, weight_stride, 1.0, WEIGHTED)
        if ERASE:
            key = keys.load([chunk * C, tile * BK])
        elif LEARNED:
            channels = tile * BK + tl.arange(0, BK)
            key = load_rows(k + head // (HV // H) * DK, event, t, valid, channels, H * DK, DK, BK)
        x = product(e, gradient.to(operand), PRECISION) * (b * factor(whole - G))[:, None]
        if LEARNED:
            away = tl.sum(x * key.to(tl.float32), 1)
        if ERASE:
            pairs = tl.trans(only(read_pairs.load([row, 0]), reading, C, R, STEPS))
        else:
            pairs = product(e, tl.trans(out), PRECISION) * (b * scale)[:, None]  # row: who wrote, column: who reads
            pairs *= pair_decay(read[None, :], G[:, None], at[None, :], t[:, None], READ_BEFORE)
        x = tl.dot(pairs.to(operand), query, acc=x, input_precision=PRECISION)
        if LEARNED:
            tl.store(given + tile * between + here, tl.sum(x * key.to(tl.float32), 1) - away, mask=valid)
            tl.store(leaving + tile * between + here, away, mask=valid)
        if ERASE:  # `reverse`'s gradient, rounding by rounding, as in `readers`
            write = (tl.trans(out).to(tl.float32) * (factor(read) * scale)[None, :]).to(operand)
            gradient = tl.dot(write, query, acc=gradient * factor(whole), input_precision=PRECISION)
            write = (tl.trans(values.load([chunk * C, 0])).to(tl.float32) * -factor(look)[None, :]).to(operand)
            gradient = tl.dot(write, key, acc=gradient, input_precision=PRECISION)
            x += dks.load([chunk * C, tile * BK]).to(tl.float32)
        else:
            write = (query.to(tl.float32) * (factor(read) * scale)[:, None]).to(operand)
            gradient = tl.dot(tl.trans(out), write, acc=gradient * factor(whole), input_precision=PRECISION)
        dks.store([chunk * C, tile * BK], x.to(operand))
