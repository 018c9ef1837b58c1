"""Device functions: a slot of the memory, a row of numbers Z [dk, m], Y [m, dv], c [m], d [dv], a tile of hidden units at a time."""

import triton
import triton.language as tl

from ..mini_batch.places import store_block
from ..tiles import load_block, product


@triton.jit
def slot_size(DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr):
    return DK * M + M * DV + (M + DV if BIASED else 0)


@triton.jit
def load_lower(slot, keys, units, DK: tl.constexpr, M: tl.constexpr):
    """Z of some hidden units, [keys, units]."""
    return load_block(slot, keys, units, DK, M)


@triton.jit
def load_upper(slot, units, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr):
    """Y of some hidden units, [units, values]."""
    return load_block(slot + DK * M, units, values, M, DV)


@triton.jit
def store_lower(slot, z, keys, units, DK: tl.constexpr, M: tl.constexpr):
    store_block(slot, z, keys, units, DK, M)


@triton.jit
def store_upper(slot, y, units, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr):
    store_block(slot + DK * M, y, units, values, M, DV)


@triton.jit
def load_lower_bias(slot, units, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr):
    """c, [units]; zero where there is none."""
    if BIASED:
        return tl.load(slot + DK * M + M * DV + units, mask=units < M, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(units).to(tl.float32)


@triton.jit
def load_upper_bias(slot, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr):
    """d, [values]; zero where there is none."""
    if BIASED:
        return tl.load(slot + DK * M + M * DV + M + values, mask=values < DV, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(values).to(tl.float32)


@triton.jit
def store_lower_bias(slot, c, units, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr):
    tl.store(slot + DK * M + M * DV + units, c.to(slot.dtype.element_ty), mask=units < M)


@triton.jit
def store_upper_bias(slot, d, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr):
    tl.store(slot + DK * M + M * DV + M + values, d.to(slot.dtype.element_ty), mask=values < DV)


@triton.jit
def affine(x, weight, bias, PRECISION: tl.constexpr):
    """x weight + bias, the weights rounded to x's type, as they are kept for backward."""
    return product(x, weight.to(x.dtype), PRECISION) + bias.to(x.dtype).to(tl.float32)[None, :]
