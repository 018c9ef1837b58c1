"""The scan over chunks: outputs, the state after the last token, and what backward wants to find again.

Transposed throughout (values are rows): state S [dv, dk], errors E [dv, C]. Then S, V - S K^T and E are accumulators of
one product and the register operand of the next; nothing of the chain passes through shared memory.
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import (
    NOTHING,
    factor,
    first_slot,
    load_decays,
    load_numbers,
    load_state,
    pair_decay,
    product,
    remembered,
    scanned,
    states_of,
    store_state,
    tokens_of,
)
from .reading import read_decays, readers_of, store_answers


@kernel("blocks T scale segments segment_chunks weight_stride")
def forward_kernel(
    q, k, v, decays, bounds, weight, inverse, reads, start, o, error, checkpoints, last, transfer, cu_seqlens,
    blocks, T, scale, segments, segment_chunks, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, STEPS: tl.constexpr, EVERY: tl.constexpr, CHECKPOINT: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr,
    WEIGHTED: tl.constexpr, STARTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, LOCAL: tl.constexpr,
    SAVE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head over one segment (segment_chunks chunks) of a sequence.

        E = T (V - decay K S)          T: `inverse`; without ERASE E = V
        O = scale (decay Q S + (Q K^T * decay) bE),     S <- decay S + (decay K)^T bE

    start, last: [N, segments, Hv, dk, dv]. SAVE: E too, for backward.
    CHECKPOINT: and S before the last of every EVERY chunks.
    LOCAL: from S = 0, no outputs but `last`; further tiles carry the identity instead and give the segment's transfer
    [N, segments, Hv, dk, dk] (ERASE) or its total log2 decay [N, segments, Hv]. What is forgotten by the end is not gone over.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV + ((DK + BV - 1) // BV if LOCAL and ERASE else 0)
    tile, segment, n, head, first, length, chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED, STEPS
    )
    origin = first // STEPS
    queries = tokens_of(q, origin, head // (HV // H), length // STEPS, H, DK, R, BK)
    keys_ = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    values_ = tokens_of(v, first, head, length, HV, DV, C, BV)
    outs = tokens_of(o, origin, head, length // STEPS, HV, DV, R, BV)
    if ERASE:
        systems = tokens_of(inverse, first, head, length, HV, C, C, C)
        pairs_ = tokens_of(reads, origin, head, length // STEPS, HV, C, R, C)
        if SAVE:
            errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    if CHECKPOINT and not LOCAL:
        states = states_of(checkpoints, blocks * HV, DK, DV, BK, BV)
    keys = tl.arange(0, BK)
    values = tile * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    state = tl.zeros([BV, BK], tl.float32)
    left = 0.0
    if LOCAL and GATED:
        felt, left = remembered(bounds, head, first_slot(cu_seqlens, n, T, C, PACKED, STEPS) + begin, end - begin, HV, False)
    else:
        felt = end - begin
    if LOCAL and ERASE:
        unit = tile - tl.cdiv(DV, BV)
        if unit >= 0:
            values = unit * BV + tl.arange(0, BV)
            if left <= NOTHING:
                felt = 0
            else:
                state = tl.where(values[:, None] == keys[None, :], 1.0, 0.0)
                felt = end - begin
    if STARTED:
        state = load_state(start + place * DK * DV, keys, values, DK, DV)

    for chunk in range(end - felt, end):
        event = first + chunk * C
        valid = chunk * C + i < length
        key = keys_.load([chunk * C, 0])
        value = tl.trans(values_.load([chunk * C, tile * BV]))
        operand = key.dtype
        G, before, whole = load_decays(decays, head, event, i, length - chunk * C, C, HV, GATED)
        look = before if LOOK_BEFORE else G
        b = load_numbers(weight, head, event, i, valid, weight_stride, 1.0, WEIGHTED)
        past = state.to(operand)
        if CHECKPOINT and not LOCAL and (((chunk + 1) % EVERY == 0) | (chunk == chunks - 1)):
            slot = first_slot(cu_seqlens, n, T, C * EVERY, PACKED, STEPS) + chunk // EVERY
            states.store([slot * HV + head, 0, tile * BV], tl.reshape(tl.trans(past), [1, BK, BV]))
        if ERASE:
            expected = product(past, tl.trans(key), PRECISION) * factor(look)[None, :]
            e = product((value.to(tl.float32) - expected).to(operand), tl.trans(systems.load([chunk * C, 0])), PRECISION)
            if SAVE:
                errors.store([chunk * C, tile * BV], tl.trans(e.to(operand)))
            e = e.to(operand).to(tl.float32) * b[None, :]
        else:
            e = value.to(tl.float32) * b[None, :]
        write = (e * factor(whole - G)[None, :]).to(operand)
        state = tl.dot(write, key, acc=state * factor(whole), input_precision=PRECISION)
        if not LOCAL:
            row, at, reading = readers_of(chunk, length, C, R, STEPS, READ_BEFORE)
            read = read_decays(decays, head, event, at, reading, G, before, HV, STEPS, GATED, READ_BEFORE)
            query = queries.load([row, 0])
            out = product(past, tl.trans(query), PRECISION) * (factor(read) * scale)[None, :]
            if ERASE:
                pairs = tl.trans(pairs_.load([row, 0]))  # [j, i]
            else:
                pairs = product(key, tl.trans(query), PRECISION) * scale
                pairs *= pair_decay(read[None, :], G[:, None], at[None, :], i[:, None], READ_BEFORE)
            out = tl.dot(e.to(operand), pairs.to(operand), acc=out, input_precision=PRECISION)
            answers = tl.trans(out.to(operand))
            store_answers(outs, o + head * DV, origin, row, tile * BV, answers, reading, HV * DV, DV, BV, C, R, STEPS)

    if LOCAL:
        if ERASE and tile >= tl.cdiv(DV, BV):
            store_state(transfer + place * DK * DK, state, keys, values, DK, DK)
        else:
            store_state(last + place * DK * DV, state, keys, values, DK, DV)
        if not ERASE and tile == 0:
            tl.store(transfer + place, left)
    elif (end == chunks) & ((begin < chunks) | (segment == 0)):
        store_state(last + (n * HV + head).to(tl.int64) * DK * DV, state, keys, values, DK, DV)
