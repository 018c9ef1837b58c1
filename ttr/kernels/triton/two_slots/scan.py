"""Device functions that the scans share: a program's place, both states in and out, and both behind a chunk."""

import triton
import triton.language as tl

from ..mini_batch.places import store_block
from ..tiles import first_slot, load_block, sequence
from .levels import load_column, load_mixing


@triton.jit
def place_of(cu_seqlens, T, TILES: tl.constexpr, HV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr):
    """Of a scan's program: tile, sequence and head; the sequence's first token, length, chunks and first chunk's slot."""
    tile = tl.program_id(0) % TILES
    n = tl.program_id(0) // TILES // HV
    head = tl.program_id(0) // TILES % HV
    first, length = sequence(cu_seqlens, n, T, PACKED)
    return tile, n, head, first, length, tl.cdiv(length, C), first_slot(cu_seqlens, n, T, C, PACKED)


@triton.jit
def advanced(
    z0, z1, key, e, here, mixing, slot, head, t, HV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z behind a chunk. z0, z1: [keys, values] before it; key: [C, keys]; e: U, [C, values]."""
    f0, f1 = load_column(here, LEVELS, t, C)
    m00, m01, m10, m11 = load_mixing(mixing, slot, head, HV)
    written = e.to(tl.float32)
    z0, z1 = m00 * z0 + m01 * z1, m10 * z0 + m11 * z1
    z0 = tl.dot(tl.trans(key), (written * f0[:, None]).to(key.dtype), acc=z0, input_precision=PRECISION)
    z1 = tl.dot(tl.trans(key), (written * f1[:, None]).to(key.dtype), acc=z1, input_precision=PRECISION)
    return z0, z1


@triton.jit
def load_states(base, place, keys, values, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Both states at a place of [.., 2, dk, dv], [keys, values]; zero where there are none (base None)."""
    if base is None:
        return tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32)
    else:
        at = base + place.to(tl.int64) * 2 * DK * DV
        return load_block(at, keys, values, DK, DV), load_block(at + DK * DV, keys, values, DK, DV)


@triton.jit
def store_states(base, place, z0, z1, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """The inverse of `load_states`."""
    at = base + place.to(tl.int64) * 2 * DK * DV
    store_block(at, z0, keys, values, DK, DV)
    store_block(at + DK * DV, z1, keys, values, DK, DV)
