"""The scan from the last chunk to the first: the gradients of v and of the start, transposed as `forward`.

D is the gradient of the state after a chunk, Y that of bE:

    Y = (K decay) D + (Q K^T * decay)^T dO,   dV = T^T bY,   D <- decay D + (decay Q)^T dO - (decay K)^T dV
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import (
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
from .reading import only, read_decays, readers_of


@kernel("blocks T scale segments segment_chunks weight_stride")
def reverse_kernel(
    q, k, decays, bounds, weight, inverse, reads, do, end_gradient, dv, checkpoints, first_gradient, cu_seqlens,
    blocks, T, scale, segments, segment_chunks, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, STEPS: tl.constexpr, EVERY: tl.constexpr, LEAST_WEIGHT: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr,
    LEARNED: tl.constexpr, WEIGHTED: tl.constexpr, FIRST: tl.constexpr, STARTED: tl.constexpr, LOOK_BEFORE: tl.constexpr,
    READ_BEFORE: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head over one segment, backwards.

    end_gradient, first_gradient: [N, segments, Hv, dk, dv]. dv: without ERASE the gradient of bV, Y.
    LEARNED: checkpoints, D behind the last of every EVERY chunks. FIRST: first_gradient of segment 0. LOCAL: from D = 0,
    nothing but first_gradient, of segments 1, 2, ...; what nobody remembers at their start is not gone over.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    tile, segment, n, head, first, length, chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 1 if LOCAL else 0, HV, C, PACKED, STEPS
    )  # LOCAL: the first segment is nobody's future
    origin = first // STEPS
    queries = tokens_of(q, origin, head // (HV // H), length // STEPS, H, DK, R, BK)
    keys_ = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    outs = tokens_of(do, origin, head, length // STEPS, HV, DV, R, BV)
    if ERASE:
        systems = tokens_of(inverse, first, head, length, HV, C, C, C)
        pairs_ = tokens_of(reads, origin, head, length // STEPS, HV, C, R, C)
    if LEARNED and not LOCAL:
        states = states_of(checkpoints, blocks * HV, DK, DV, BK, BV)
    if not LOCAL:
        dvs = tokens_of(dv, first, head, length, HV, DV, C, BV)
    keys = tl.arange(0, BK)
    values = tile * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    gradient = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        gradient = load_state(end_gradient + place * DK * DV, keys, values, DK, DV)

    if LOCAL and GATED:
        felt, _left = remembered(bounds, head, first_slot(cu_seqlens, n, T, C, PACKED, STEPS) + begin, end - begin, HV, True)
        end = begin + felt

    for step in range(0, end - begin):
        chunk = end - 1 - step
        event = first + chunk * C
        valid = chunk * C + i < length
        key = keys_.load([chunk * C, 0])
        row, at, reading = readers_of(chunk, length, C, R, STEPS, READ_BEFORE)
        query = queries.load([row, 0])
        out = tl.trans(outs.load([row, tile * BV]))
        operand = key.dtype
        G, before, whole = load_decays(decays, head, event, i, length - chunk * C, C, HV, GATED)
        read = read_decays(decays, head, event, at, reading, G, before, HV, STEPS, GATED, READ_BEFORE)
        look = before if LOOK_BEFORE else G
        b = load_numbers(weight, head, event, i, valid, weight_stride, 1.0, WEIGHTED)
        if LEARNED and not LOCAL and (((chunk + 1) % EVERY == 0) | (chunk == chunks - 1)):
            slot = first_slot(cu_seqlens, n, T, C * EVERY, PACKED, STEPS).to(tl.int64) + chunk // EVERY
            checkpoint = tl.reshape(tl.trans(gradient.to(operand)), [1, BK, BV])
            states.store([(slot * HV + head).to(tl.int32), 0, tile * BV], checkpoint)
        future = gradient.to(operand)
        y = product(future, tl.trans(key), PRECISION) * factor(whole - G)[None, :]
        read_out = (out.to(tl.float32) * (factor(read) * scale)[None, :]).to(operand)
        gradient = tl.dot(read_out, query, acc=gradient * factor(whole), input_precision=PRECISION)
        if ERASE:
            pairs = only(pairs_.load([row, 0]), reading, C, R, STEPS)  # [i, j]
        else:
            pairs = product(query, tl.trans(key), PRECISION) * scale
            pairs *= pair_decay(read[:, None], G[None, :], at[:, None], i[None, :], READ_BEFORE)
        y = tl.dot(out, pairs.to(operand), acc=y, input_precision=PRECISION)
        if ERASE:
            if WEIGHTED:  # the gradient of the weight comes of dv, divided by it
                b = tl.where(tl.abs(b) < LEAST_WEIGHT, LEAST_WEIGHT, b)
            y = product((y * b[None, :]).to(operand), systems.load([chunk * C, 0]), PRECISION).to(operand)
            write = (y.to(tl.float32) * -factor(look)[None, :]).to(operand)  # of what `keys` is given
            gradient = tl.dot(write, key, acc=gradient, input_precision=PRECISION)
        if not LOCAL:
            dvs.store([chunk * C, tile * BV], tl.trans(y.to(operand)))

    if LOCAL:
        store_state(first_gradient + place * DK * DV, gradient, keys, values, DK, DV)
    elif FIRST and segment == 0:
        store_state(first_gradient + (n * HV + head).to(tl.int64) * DK * DV, gradient, keys, values, DK, DV)
