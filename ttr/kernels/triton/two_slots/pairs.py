"""What backward needs of every pair of tokens in a chunk: the weights with which keys and queries meet, and the levels' gradients."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, locate, product, sequence, store_pairs
from .levels import levels_of, load_column, load_look, load_read, masks


@triton.jit
def added(a, b, c, d):
    """Two pairs of numbers, for `tl.reduce`."""
    return a + c, b + d


@triton.jit
def store_sums(here, row, first, second, t, C: tl.constexpr, AXIS: tl.constexpr):
    """Both are summed in one go: warps wait for each other once."""
    by_first, by_second = tl.reduce((first, second), AXIS, added)
    tl.store(here + row * C + t, by_first)
    tl.store(here + (row + 1) * C + t, by_second)


@kernel("N T")
def pairs_kernel(
    q, k, error, do, dv, levels, read_pairs, look_pairs, dlevels, cu_seqlens, N, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program. Row i of a reader, column j of a writer:

        read_pairs = R * dO U^T,   look_pairs = -P * dV U^T,     dR = Q K^T * dO U^T,   dP = -K K^T * dV U^T

    read_pairs, look_pairs: [tokens, Hv, C]. dlevels: of the rows and columns of every level but the last, from dR and dP.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    here = levels_of(levels, slot, head, HV, C, LEVELS)
    given = levels_of(dlevels, slot, head, HV, C, LEVELS)
    e = load_rows(error + head * DV, token, t, valid, values, HV * DV, DV, BV)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    look, read = masks(here, t, C, LEVELS, ERASE)
    out = load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV)
    dread = product(out, tl.trans(e), PRECISION)
    store_pairs(read_pairs, token, head, dread * read, t, valid, HV, C)
    query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    dread *= product(query, tl.trans(key), PRECISION)
    dlook = dread
    if ERASE:
        value = load_rows(dv + head * DV, token, t, valid, values, HV * DV, DV, BV)
        dlook = -product(value, tl.trans(e), PRECISION)
        store_pairs(look_pairs, token, head, dlook * look, t, valid, HV, C)
        dlook *= product(key, tl.trans(key), PRECISION)
    i = t[:, None]
    j = t[None, :]
    apart = i ^ j
    tl.store(given + (6 * LEVELS + 6) * C + t, tl.sum(tl.where(apart == 0, dread, 0.0), 1))
    for level in range(LEVELS):
        across = (i > j) & (apart >> level == 1)
        x = tl.where(across, dread, 0.0)
        r0, r1 = load_read(here, level, t, C)
        c0, c1 = load_column(here, level, t, C)
        store_sums(given, 6 * level + 2, x * c0[None, :], x * c1[None, :], t, C, 1)
        x0 = x * r0[:, None]
        x1 = x * r1[:, None]
        if ERASE:
            l0, l1 = load_look(here, level, t, C)
            x = tl.where(across, dlook, 0.0)
            store_sums(given, 6 * level, x * c0[None, :], x * c1[None, :], t, C, 1)
            x0 += x * l0[:, None]
            x1 += x * l1[:, None]
        store_sums(given, 6 * level + 4, x0, x1, t, C, 0)
