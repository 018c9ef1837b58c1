"""What backward needs of every pair of tokens in a chunk (ERASE): <dO_i, U_j> for reads, -<dV_i, U_j> for looks, and their decays."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_decays, load_numbers, load_rows, locate, pair_decay, product, sequence, store_pairs


@kernel("N T scale weight_stride")
def pairs_kernel(
    error, do, dv, decays, weight, reads, looks, dweight, cu_seqlens, N, T, scale, weight_stride,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEAST_WEIGHT: tl.constexpr, GATED: tl.constexpr,
    WEIGHTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program. reads, looks: [tokens, Hv, C], row i of a reader, column j of a writer.

    WEIGHTED: dweight, [tokens, Hv]; dv has the weight, as `reverse` bounds it, in it.
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    channels = tl.arange(0, BV)
    valid = chunk * C + t < length
    token = first + chunk * C
    e = load_rows(error + head * DV, token, t, valid, channels, HV * DV, DV, BV)
    out = load_rows(do + head * DV, token, t, valid, channels, HV * DV, DV, BV)
    value = load_rows(dv + head * DV, token, t, valid, channels, HV * DV, DV, BV)
    b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED)
    G, before, _ = load_decays(decays, head, token, t, length - chunk * C, C, HV, GATED)
    i = t[:, None]
    j = t[None, :]
    read = before if READ_BEFORE else G
    look = before if LOOK_BEFORE else G
    pairs = product(out, tl.trans(e), PRECISION) * (b * scale)[None, :]
    store_pairs(reads, token, head, pairs * pair_decay(read[:, None], G[None, :], i, j, READ_BEFORE), t, valid, HV, C)
    pairs = product(value, tl.trans(e), PRECISION)
    if WEIGHTED:
        own = tl.sum(tl.where(i == j, pairs, 0.0), 1) / tl.where(tl.abs(b) < LEAST_WEIGHT, LEAST_WEIGHT, b)
        tl.store(dweight + (token + t) * HV + head, own, mask=valid)
    pairs *= -b[None, :] * pair_decay(look[:, None], G[None, :], i, j, True)
    store_pairs(looks, token, head, pairs, t, valid, HV, C)
