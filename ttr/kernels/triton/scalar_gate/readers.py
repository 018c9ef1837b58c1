"""The gradients of what reads the state: of q, which is given dO, and of k as it looks, which is given -dV.

A scan from the first chunk to the last. It is `forward` with the roles turned: dO and dV read, U = bE writes, and the
state is the same S, here a tile of key channels, [dv, keys]:

    dQ = scale (decay dO S^T + (dO U^T * decay) K),     look: dK = -(decay dV S^T + (dV U^T * decay) K)

The looks inside a chunk also give to the keys that wrote: dK -= (dV U^T * decay)^T K.
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import factor, load_decays, load_numbers, load_rows, load_state, pair_decay, product, scanned, tokens_of
from .reading import read_decays, readers_of, store_answers


@kernel("events T scale segments segment_chunks weight_stride")
def readers_kernel(
    q, k, error, do, dv, reads, looks, decays, weight, start, dq, dk, taken, unseen, asked, cu_seqlens,
    events, T, scale, segments, segment_chunks, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, STEPS: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, WEIGHTED: tl.constexpr,
    STARTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of key channels of one value head over one segment. dq: [tokens, Hv, dk], and with ERASE dk: [events, Hv, dk].

    reads, looks: of `pairs_kernel`, with ERASE. STAGES: also for the loads that no product takes, or None to leave those alone.
    LEARNED: for the gradient of the log decay, partial sums per tile, [tiles, events, Hv]: what every event takes of
    earlier ones less what the looks inside the chunk take of it (taken), and how much of that its own decay never saw (unseen).
    With several STEPS these are of the looks alone; what the reads take is apart (asked, [tiles, tokens, Hv]).
    """
    TILES: tl.constexpr = (DK + BK - 1) // BK
    tile, _segment, _n, head, first, length, _chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED, STEPS
    )
    origin = first // STEPS
    keys = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    outs = tokens_of(do, origin, head, length // STEPS, HV, DV, R, BV)
    errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    dqs = tokens_of(dq, origin, head, length // STEPS, HV, DK, R, BK)
    if LEARNED and not ERASE:
        queries = tokens_of(q, origin, head // (HV // H), length // STEPS, H, DK, R, BK)
    if ERASE:
        read_pairs = tokens_of(reads, origin, head, length // STEPS, HV, C, R, C)
        look_pairs = tokens_of(looks, first, head, length, HV, C, C, C)
        values = tokens_of(dv, first, head, length, HV, DV, C, BV)
        dks = tokens_of(dk, first, head, length, HV, DK, C, BK)
    between = events.to(tl.int64) * HV
    t = tl.arange(0, C)
    state = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        state = load_state(start + place * DK * DV, tile * BK + tl.arange(0, BK), tl.arange(0, BV), DK, DV)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        event = first + chunk * C
        valid = chunk * C + t < length
        here = (event + t) * HV + head
        row, at, reading = readers_of(chunk, length, C, R, STEPS, READ_BEFORE)
        key = keys.load([chunk * C, tile * BK])
        out = outs.load([row, 0])
        if not ERASE:
            e = errors.load([chunk * C, 0])
        operand = key.dtype
        G, before, whole = load_decays(decays, head, event, t, length - chunk * C, C, HV, GATED)
        read = read_decays(decays, head, event, at, reading, G, before, HV, STEPS, GATED, READ_BEFORE)
        look = before if LOOK_BEFORE else G
        b = load_numbers(weight, head, event, t, valid, weight_stride, 1.0, WEIGHTED)
        if LEARNED and ERASE:
            columns = tile * BK + tl.arange(0, BK)
            query = load_rows(q + head // (HV // H) * DK, origin + row, tl.arange(0, R), reading, columns, H * DK, DK, BK)
        past = state.to(operand)
        x = product(out, past, PRECISION) * (factor(read) * scale)[:, None]
        if ERASE:
            pairs = read_pairs.load([row, 0])
        else:
            pairs = product(out, tl.trans(e), PRECISION) * (b * scale)[None, :]
            pairs *= pair_decay(read[:, None], G[None, :], at[:, None], t[None, :], READ_BEFORE)
        x = tl.dot(pairs.to(operand), key, acc=x, input_precision=PRECISION)
        store_answers(dqs, dq + head * DK, origin, row, tile * BK, x.to(operand), reading, HV * DK, DK, BK, C, R, STEPS)
        if LEARNED:
            if not ERASE:  # late: registers are short before
                query = queries.load([row, tile * BK])
            net = tl.sum(x * query.to(tl.float32), 1)
            if STEPS > 1:
                places = tile * (between // STEPS) + (origin + row + tl.arange(0, R)) * HV + head
                tl.store(asked + places, net, mask=reading)
            elif READ_BEFORE:
                hidden = net
        if ERASE:
            pairs = look_pairs.load([chunk * C, 0])
            x = product(values.load([chunk * C, 0]), past, PRECISION) * -factor(look)[:, None]
            x = tl.dot(pairs, key, acc=x, input_precision=PRECISION)
            given = product(tl.trans(pairs), key, PRECISION)
            dks.store([chunk * C, tile * BK], (x + given).to(operand))
            if LEARNED:
                own = tl.sum((x - given) * key.to(tl.float32), 1)
                net = own if STEPS > 1 else net + own
                if LOOK_BEFORE:
                    looked = tl.sum(x * key.to(tl.float32), 1)
                    if READ_BEFORE and STEPS == 1:
                        hidden += looked
                    else:
                        hidden = looked
        if LEARNED and (ERASE or STEPS == 1):
            tl.store(taken + tile * between + here, net, mask=valid)
            if (READ_BEFORE and STEPS == 1) or (ERASE and LOOK_BEFORE):
                tl.store(unseen + tile * between + here, hidden, mask=valid)
        if ERASE:  # `forward`'s state, rounding by rounding: its errors correct what it has rounded, not what is rounded otherwise here
            e = tl.trans(errors.load([chunk * C, 0])).to(tl.float32)  # late: registers are short before
            write = (e * b[None, :] * factor(whole - G)[None, :]).to(operand)
            state = tl.dot(write, key, acc=state * factor(whole), input_precision=PRECISION)
        else:
            write = (key.to(tl.float32) * (b * factor(whole - G))[:, None]).to(operand)
            state = tl.dot(tl.trans(e), write, acc=state * factor(whole), input_precision=PRECISION)
