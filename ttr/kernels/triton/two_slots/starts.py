"""The forward scan once more, from the errors that it found: the states before every chunk, for backward."""

import triton.language as tl

from ..launch import kernel
from ..tiles import tokens_of
from .levels import levels_of
from .scan import advanced, load_states, place_of, store_states


@kernel("T")
def starts_kernel(
    k, error, levels, mixing, start, starts, cu_seqlens, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of key channels and one of value channels of one head of a sequence. starts: [chunks, Hv, 2, dk, dv].

    No column of a state asks for another, nor a row: the tiles are as small as it takes to fill the GPU.
    """
    KEY_TILES: tl.constexpr = (DK + BK - 1) // BK
    VALUE_TILES: tl.constexpr = (DV + BV - 1) // BV
    tile, n, head, first, length, chunks, slot = place_of(cu_seqlens, T, KEY_TILES * VALUE_TILES, HV, C, PACKED)
    row = tile // VALUE_TILES * BK
    column = tile % VALUE_TILES * BV
    keys_ = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    keys = row + tl.arange(0, BK)
    values = column + tl.arange(0, BV)
    t = tl.arange(0, C)
    z0, z1 = load_states(start, n * HV + head, keys, values, DK, DV, BK, BV)
    for chunk in range(chunks):
        store_states(starts, (slot + chunk).to(tl.int64) * HV + head, z0, z1, keys, values, DK, DV)
        here = levels_of(levels, slot + chunk, head, HV, C, LEVELS)
        key = keys_.load([chunk * C, row])
        e = errors.load([chunk * C, column])
        z0, z1 = advanced(z0, z1, key, e, here, mixing, slot + chunk, head, t, HV, C, LEVELS, PRECISION)
