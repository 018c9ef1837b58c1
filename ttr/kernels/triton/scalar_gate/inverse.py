"""The triangular system of every chunk, inverted: [(I + A)^-1], A_ij = decay_ij <x_i, w_j> b_j for i > j."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import load_decays, load_numbers, load_rows, locate, pair_decay, product, sequence, store_bound, store_pairs
from .reading import read_decays, readers_of


@triton.jit
def unit_lower_inverse(a, i, j, C: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for a: [C, C] strictly lower triangular, rows i and columns j.

    Blocks double: with the inverses X of the diagonal blocks of size b at hand, those of size 2b are X - X a_b X, where
    a_b is what a holds between two neighbours. Nothing is squared, so correlated keys and steps up to 2 stay exact
    (a Neumann series does not). HALF: operands in fp16, whose eleven bits are what tf32 has, and twice as fast.
    """
    x = tl.where(i == j, 1.0, tl.where((i // 2 == j // 2), -a, 0.0))
    if HALF:
        a = a.to(tl.float16)
    for level in tl.static_range(1, 8):
        if 2**level < C:
            between = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), a, 0.0)
            if HALF:
                half = x.to(tl.float16)
                x -= product(product(half, between, PRECISION).to(tl.float16), half, PRECISION)
            else:
                x -= product(product(x, between, PRECISION), x, PRECISION)
    return x


@kernel("N T scale weight_stride")
def inverse_kernel(
    q, k, decays, weight, inverse, reads, bounds, cu_seqlens, N, T, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr,
    GATED: tl.constexpr, WEIGHTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and key head a program; its value heads share the products of keys and queries.

    inverse: [events, Hv, C]. reads: [tokens, Hv, C], what token i reads of write j: scale decay_ij <q_i, k_j> for i >= j.
    bounds: [chunks, Hv], of `store_bound`.
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED, STEPS)
    h = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED, STEPS)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    event = first + chunk * C
    row, at, reading = readers_of(chunk, length, C, R, STEPS, READ_BEFORE)
    reader = first // STEPS + row
    key = load_rows(k + h * DK, event, t, valid, tl.arange(0, BK), H * DK, DK, BK)
    query = load_rows(q + h * DK, reader, tl.arange(0, R), reading, tl.arange(0, BK), H * DK, DK, BK)
    looks = product(key, tl.trans(key), PRECISION)
    pairs = product(query, tl.trans(key), PRECISION) * scale
    i = t[:, None]
    j = t[None, :]
    squares = tl.sum(tl.where(i == j, looks, 0.0), 1)
    for group in range(HV // H):
        head = h * (HV // H) + group
        b = load_numbers(weight, head, event, t, valid, weight_stride, 1.0, WEIGHTED)
        G, before, _ = load_decays(decays, head, event, t, length - chunk * C, C, HV, GATED)
        if GATED:
            store_bound(bounds, tl.program_id(0), head, squares, b, G, before, valid, HV, LOOK_BEFORE)
        read = read_decays(decays, head, event, at, reading, G, before, HV, STEPS, GATED, READ_BEFORE)
        read_here = pairs * pair_decay(read[:, None], G[None, :], at[:, None], j, READ_BEFORE)
        store_pairs(reads, reader, head, read_here, tl.arange(0, R), reading, HV, C)
        look = before if LOOK_BEFORE else G
        a = looks * pair_decay(look[:, None], G[None, :], i, j, True) * b[None, :]
        solved = unit_lower_inverse(a, i, j, C, PRECISION == "tf32", PRECISION)
        store_pairs(inverse, event, head, solved, t, valid, HV, C)
