"""The gradient of what reads the state: of q, which is given dO, and of k as it looks, which is given -dV.

A scan from the first chunk to the last. It is `forward` with the roles turned: dO reads, U = bE writes, and the state
is the same S, here a tile of key channels, [dv, keys]:

    dQ = scale (decay dO S^T + (dO U^T * decay) K),     look: dK = -(decay dV S^T + (dV U^T * decay) K)
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import factor, load_decays, load_numbers, load_rows, load_state, product, scanned, tokens_of


@kernel("tokens T scale segments segment_chunks weight_stride")
def readers_kernel(
    reader, k, error, out_gradient, chunk_pairs, own, decays, weight, start, dreader, entering, cu_seqlens,
    tokens, T, scale, segments, segment_chunks, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LOOK: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, WEIGHTED: tl.constexpr,
    STARTED: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of key channels of one value head over one segment. chunk_pairs, own: of `pairs_kernel`.
    dreader: [tokens, Hv, dk]. BEFORE: reads know no decay of their own token.

    LOOK: the readers are keys. Then dreader also takes what the pairs inside a chunk give to the keys as writers.
    LEARNED: also what every token reads of earlier chunks, for the gradient of the log decay: entering, a partial sum per
    tile, those of LOOK behind the others.
    """
    tile = tl.program_id(0)
    segment = tl.program_id(2)
    _n, head, first, length, _chunks, begin, end, place = scanned(cu_seqlens, T, segment, segments, segment_chunks, HV, C, PACKED)
    keys = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    outs = tokens_of(out_gradient, first, head, length, HV, DV, C, BV)
    errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    pairs = tokens_of(chunk_pairs, first, head, length, HV, C, C, C)
    dreaders = tokens_of(dreader, first, head, length, HV, DK, C, BK)
    kind = (tl.num_programs(0) if LOOK else 0) + tile
    i = tl.arange(0, C)
    state = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        state = load_state(start + place * DK * DV, tile * BK + tl.arange(0, BK), tl.arange(0, BV), DK, DV)
    for chunk in range(begin, end):
        token = first + chunk * C
        valid = chunk * C + i < length
        key = keys.load([chunk * C, tile * BK])
        out = outs.load([chunk * C, 0])
        e = errors.load([chunk * C, 0])
        operand = key.dtype
        G, before, whole = load_decays(decays, head, token, i, length - chunk * C, C, HV, GATED)
        read = before if BEFORE else G
        b = load_numbers(weight, head, token, i, valid, weight_stride, 1.0, WEIGHTED)
        if LEARNED and not LOOK:  # no operand of a product, so nothing fetches it ahead: asked for here, it is there when used
            partner = load_rows(reader + head // (HV // H) * DK, token, i, valid, tile * BK + tl.arange(0, BK), H * DK, DK, BK)
        x = product(out, state.to(operand), PRECISION) * (factor(read) * scale)[:, None]
        if LEARNED:
            partner = (key if LOOK else partner).to(tl.float32)
            tl.store(entering + (kind * tokens + token) * HV + head + i * HV, tl.sum(x * partner, 1), mask=valid)
        between = pairs.load([chunk * C, 0])  # [i, j]
        x = tl.dot(between, key, acc=x, input_precision=PRECISION)
        if LOOK:
            x = tl.dot(tl.trans(between), key, acc=x, input_precision=PRECISION)
        elif not BEFORE:
            x += tl.load(own + (token + i) * HV + head, mask=valid, other=0.0)[:, None] * key.to(tl.float32)
        dreaders.store([chunk * C, tile * BK], x.to(operand))
        write = (key.to(tl.float32) * (b * factor(whole - G))[:, None]).to(operand)
        state = tl.dot(tl.trans(e), write, acc=state * factor(whole), input_precision=PRECISION)
