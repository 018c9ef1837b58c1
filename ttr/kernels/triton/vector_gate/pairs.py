"""What backward needs of every pair of tokens in a chunk: <dO_i, E_j> for reads, -<dE_i, E_j> for looks, and with V in E's place."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, locate, product, sequence, store_pairs


@kernel("N T scale")
def pairs_kernel(
    error, v, do, derror, reads, looks, added_reads, added_looks, cu_seqlens, N, T, scale,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program. All four: [tokens, Hv, C], row i of a reader, column j of a writer; without decays."""
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    channels = tl.arange(0, BV)
    valid = chunk * C + t < length
    token = first + chunk * C
    i = t[:, None]
    j = t[None, :]
    seen = i > j if READ_BEFORE else i >= j
    e = tl.trans(load_rows(error + head * DV, token, t, valid, channels, HV * DV, DV, BV))
    out = load_rows(do + head * DV, token, t, valid, channels, HV * DV, DV, BV)
    store_pairs(reads, token, head, tl.where(seen, product(out, e, PRECISION) * scale, 0.0), t, valid, HV, C)
    if ERASE:
        de = load_rows(derror + head * DV, token, t, valid, channels, HV * DV, DV, BV)
        store_pairs(looks, token, head, tl.where(i > j, -product(de, e, PRECISION), 0.0), t, valid, HV, C)
    if ADDED:
        value = tl.trans(load_rows(v + head * DV, token, t, valid, channels, HV * DV, DV, BV))
        store_pairs(added_reads, token, head, tl.where(seen, product(out, value, PRECISION) * scale, 0.0), t, valid, HV, C)
        store_pairs(added_looks, token, head, tl.where(i > j, -product(de, value, PRECISION), 0.0), t, valid, HV, C)
