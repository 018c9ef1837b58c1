"""What backward needs of every pair of tokens in a chunk: <dO_i, U_j> for reads and -<dV_i, U_j> for looks, decayed."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_decays, load_numbers, load_rows, locate, pair_decay, product, sequence, store_pairs


@kernel("N T scale weight_stride")
def pairs_kernel(
    error, do, dv, decays, weight, reads, looks, own, cu_seqlens, N, T, scale, weight_stride,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr,
    WEIGHTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program. reads, looks: [tokens, Hv, C], row i of a reader, column j < i of a writer.

    own: [tokens, Hv], what a token reads of its own write. It knows no decay, so it is kept apart: in the sums behind the
    gradient of the log decay it would have to cancel, and would leave its rounding where the truth is 1e-13.
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
    store_pairs(reads, token, head, pairs * pair_decay(read[:, None], G[None, :], i, j, True), t, valid, HV, C)
    if not READ_BEFORE:
        diagonal = tl.sum(out.to(tl.float32) * e.to(tl.float32), 1) * b * scale
        tl.store(own + (token + t) * HV + head, diagonal, mask=valid)
    if ERASE:
        look = before if LOOK_BEFORE else G
        out = load_rows(dv + head * DV, token, t, valid, channels, HV * DV, DV, BV)
        pairs = product(out, tl.trans(e), PRECISION) * -b[None, :]
        store_pairs(looks, token, head, pairs * pair_decay(look[:, None], G[None, :], i, j, True), t, valid, HV, C)
