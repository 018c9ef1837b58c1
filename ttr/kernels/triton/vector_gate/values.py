"""The gradient of v where it is written with keys p of its own: dV = added D + added_reads^T dO - added_looks^T dE.

added, p decayed to the chunk's end, is made here: this comes last, when the other rows are gone.
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_block, load_rows, locate, product, sequence, store_rows
from .decays import load_decays, power, remaining


@kernel("N T")
def values_kernel(
    p, log_decay, added_reads, added_looks, gradients, do, derror, dv, cu_seqlens, N, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, value head and tile of value channels a program, BK key channels at a time."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    slot = tl.program_id(0) // TILES
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    values = tl.program_id(0) % TILES * BV + tl.arange(0, BV)
    state = gradients + (slot.to(tl.int64) * HV + head) * DK * DV
    pairs = tl.trans(load_rows(added_reads + head * C, token, t, valid, t, HV * C, C, C))
    x = product(pairs, load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV), PRECISION)
    pairs = tl.trans(load_rows(added_looks + head * C, token, t, valid, t, HV * C, C, C))
    x -= product(pairs, load_rows(derror + head * DV, token, t, valid, values, HV * DV, DV, BV), PRECISION)
    for start in range(0, DK, BK):
        keys = start + tl.arange(0, BK)
        decays = load_decays(log_decay + head * DK, token, t, valid, keys, HV * DK * PER_TOKEN, DK, BK, WIDE)
        add = load_rows(p + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        add = (add.to(tl.float32) * power(remaining(decays, t, WIDE))).to(add.dtype)
        x = tl.dot(add, load_block(state, keys, values, DK, DV), acc=x, input_precision=PRECISION)
    store_rows(dv + head * DV, token, x, t, valid, values, HV * DV, DV, BV)
