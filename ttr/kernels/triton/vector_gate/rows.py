"""The rows of a chunk, decayed, once more for the scans of backward (ERASE): forward keeps what took products of all pairs, not these.

queries, writes, added and looks of `prepare`, of near and of far chunks: no exponent here is above 0.
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, locate, product, sequence, store_rows
from .decays import load_decays, load_weights, power, summed


@kernel("N T scale weight_stride")
def rows_kernel(
    q, k, p, log_decay, weight, inverse, queries, looks, writes, added, cu_seqlens, N, T, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ADDED: tl.constexpr, WEIGHTED: tl.constexpr,
    BY_CHANNEL: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, value head and tile of key channels a program. Arguments as of `prepare_kernel`."""
    TILES: tl.constexpr = (DK + BK - 1) // BK
    slot = tl.program_id(0) // TILES
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    own = head // (HV // H) * DK
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    channels = tl.program_id(0) % TILES * BK + tl.arange(0, BK)
    x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
    query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
    key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
    b = load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
    if ADDED:
        adder = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK)
    solved = load_rows(inverse + head * C, token, t, valid, t, HV * C, C, C)
    operand: tl.constexpr = key.dtype
    G, before, whole = summed(x, t, LOOK_BEFORE or READ_BEFORE, WIDE)
    decayed = (key.to(tl.float32) * power(before if LOOK_BEFORE else G)).to(operand)
    store_rows(looks + head * DK, token, -product(solved, decayed, PRECISION), t, valid, channels, HV * DK, DK, BK)
    query = query.to(tl.float32) * (power(before if READ_BEFORE else G) * scale)
    store_rows(queries + head * DK, token, query, t, valid, channels, HV * DK, DK, BK)
    ending = power(whole - G)
    store_rows(writes + head * DK, token, key.to(tl.float32) * b * ending, t, valid, channels, HV * DK, DK, BK)
    if ADDED:
        store_rows(added + head * DK, token, adder.to(tl.float32) * ending, t, valid, channels, HV * DK, DK, BK)
