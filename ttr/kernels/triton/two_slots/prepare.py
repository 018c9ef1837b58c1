"""What of a chunk waits for nobody: its triangular system, inverted, and what its queries read of its writes."""

import triton.language as tl

from ..launch import kernel
from ..scalar_gate.inverse import unit_lower_inverse
from ..tiles import load_rows, locate, product, sequence, store_pairs
from .levels import levels_of, masks


@kernel("N T")
def prepare_kernel(
    q, k, levels, inverse, reads, cu_seqlens, N, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ERASE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and key head a program; its value heads share the products of keys and queries.

    inverse: [tokens, Hv, C], (I + P * K K^T)^-1, with ERASE. reads: [tokens, Hv, C], R * Q K^T.
    """
    slot = tl.program_id(0)
    h = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    key = load_rows(k + h * DK, token, t, valid, tl.arange(0, BK), H * DK, DK, BK)
    query = load_rows(q + h * DK, token, t, valid, tl.arange(0, BK), H * DK, DK, BK)
    pairs = product(query, tl.trans(key), PRECISION)
    if ERASE:
        grams = product(key, tl.trans(key), PRECISION)
    for group in range(HV // H):
        head = h * (HV // H) + group
        look, read = masks(levels_of(levels, slot, head, HV, C, LEVELS), t, C, LEVELS, ERASE)
        store_pairs(reads, token, head, pairs * read, t, valid, HV, C)
        if ERASE:
            solved = unit_lower_inverse(grams * look, t[:, None], t[None, :], C, PRECISION == "tf32", PRECISION)
            store_pairs(inverse, token, head, solved, t, valid, HV, C)
