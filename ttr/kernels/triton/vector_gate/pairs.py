"""What backward needs of every pair of tokens in a chunk: <dO_i, E_j> for reads, -<dE_i, E_j> for looks, and with V in E's place."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, locate, sequence, store_pairs


@kernel("N T scale")
def pairs_kernel(
    error, v, do, derror, reads, looks, added_reads, added_looks, cu_seqlens, N, T, scale,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program, BV value channels at a time.

    All four: [tokens, Hv, C], row i of a reader, column j of a writer; without decays.
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    i = t[:, None]
    j = t[None, :]
    xr = tl.zeros([C, C], tl.float32)
    xl = tl.zeros([C, C], tl.float32)
    xar = tl.zeros([C, C], tl.float32)
    xal = tl.zeros([C, C], tl.float32)
    for start in range(0, DV, BV):
        values = start + tl.arange(0, BV)
        out = load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV)
        e = tl.trans(load_rows(error + head * DV, token, t, valid, values, HV * DV, DV, BV))
        xr = tl.dot(out, e, acc=xr, input_precision=PRECISION)
        if ERASE:
            de = load_rows(derror + head * DV, token, t, valid, values, HV * DV, DV, BV)
            xl = tl.dot(de, e, acc=xl, input_precision=PRECISION)
        if ADDED:
            value = tl.trans(load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV))
            xar = tl.dot(out, value, acc=xar, input_precision=PRECISION)
            xal = tl.dot(de, value, acc=xal, input_precision=PRECISION)
    seen = i > j if READ_BEFORE else i >= j
    store_pairs(reads, token, head, tl.where(seen, xr * scale, 0.0), t, valid, HV, C)
    if ERASE:
        store_pairs(looks, token, head, tl.where(i > j, -xl, 0.0), t, valid, HV, C)
    if ADDED:
        store_pairs(added_reads, token, head, tl.where(seen, xar * scale, 0.0), t, valid, HV, C)
        store_pairs(added_looks, token, head, tl.where(i > j, -xal, 0.0), t, valid, HV, C)
