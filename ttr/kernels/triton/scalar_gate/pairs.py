"""What backward needs of every pair of tokens in a chunk: <dO_i, U_j> for reads, -<dV_i, U_j> for looks, and their decays."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import load_decays, load_numbers, load_rows, locate, pair_decay, product, sequence, store_pairs


@triton.jit
def within_chunk(flow, i, j, BEFORE: tl.constexpr):
    """flow: [C, C], what reader i takes of writer j < i -> [C], what passes the decay of token t: i >= t (BEFORE: i > t), j < t."""
    passing = tl.cumsum(flow, 0, reverse=True)
    if BEFORE:
        passing -= flow
    return tl.sum(tl.where(j < i, passing, 0.0), 1)


@kernel("N T scale weight_stride")
def pairs_kernel(
    q, k, error, do, dv, decays, weight, reads, looks, own, within, cu_seqlens, N, T, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, WEIGHTED: tl.constexpr, LOOK_BEFORE: tl.constexpr,
    READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program. reads, looks: [tokens, Hv, C], row i of a reader, column j < i of a writer.

    own: [tokens, Hv], what a token reads of its own write; it knows no decay. LEARNED: within, [tokens, Hv], the gradient
    of the log decay by pairs inside the chunk: a sum of those it acts on, so that a strong gate's is small and not a
    difference of large sums.
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
    b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED)
    G, before, _ = load_decays(decays, head, token, t, length - chunk * C, C, HV, GATED)
    i = t[:, None]
    j = t[None, :]
    read = before if READ_BEFORE else G
    pairs = product(out, tl.trans(e), PRECISION) * (b * scale)[None, :]
    pairs *= pair_decay(read[:, None], G[None, :], i, j, True)
    store_pairs(reads, token, head, pairs, t, valid, HV, C)
    if not READ_BEFORE:
        diagonal = tl.sum(out.to(tl.float32) * e.to(tl.float32), 1) * b * scale
        tl.store(own + (token + t) * HV + head, diagonal, mask=valid)
    if LEARNED:
        key_head = head // (HV // H)
        query = load_rows(q + key_head * DK, token, t, valid, tl.arange(0, BK), H * DK, DK, BK)
        key = load_rows(k + key_head * DK, token, t, valid, tl.arange(0, BK), H * DK, DK, BK)
        passing = within_chunk(pairs * product(query, tl.trans(key), PRECISION), i, j, READ_BEFORE)
    if ERASE:
        look = before if LOOK_BEFORE else G
        out = load_rows(dv + head * DV, token, t, valid, channels, HV * DV, DV, BV)
        pairs = product(out, tl.trans(e), PRECISION) * -b[None, :]
        pairs *= pair_decay(look[:, None], G[None, :], i, j, True)
        store_pairs(looks, token, head, pairs, t, valid, HV, C)
        if LEARNED:
            passing += within_chunk(pairs * product(key, tl.trans(key), PRECISION), i, j, LOOK_BEFORE)
    if LEARNED:
        tl.store(within + (token + t) * HV + head, passing, mask=valid)
