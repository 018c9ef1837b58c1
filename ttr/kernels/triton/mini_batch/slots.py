"""Device functions: a head's slots, a matrix [dk, dv] each with its bias [dv], in and out of a scan."""

import triton
import triton.language as tl

from ..tiles import load_block
from .places import store_block


@triton.jit
def load_slots(
    base, biases, at, keys, values, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Both slots from the `at`-th on and their biases (zero where there are none), or of one slot both twice. base: None for zeros."""
    if base is None:
        z = tl.zeros([keys.shape[0], BV], tl.float32)
    else:
        z = load_block(base + at * DK * DV, keys, values, DK, DV)
    c = tl.zeros([BV], tl.float32)
    n_z = z
    n_c = c
    if SLOTS == 2 and base is not None:
        n_z = load_block(base + (at + 1) * DK * DV, keys, values, DK, DV)
    if BIASED and base is not None:
        c = tl.load(biases + at * DV + values, mask=values < DV, other=0.0)
        if SLOTS == 2:
            n_c = tl.load(biases + (at + 1) * DV + values, mask=values < DV, other=0.0)
    return z, c, n_z, n_c


@triton.jit
def store_slots(
    base, biases, at, z, c, n_z, n_c, keys, values, DK: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_slots`."""
    store_block(base + at * DK * DV, z, keys, values, DK, DV)
    if BIASED:
        tl.store(biases + at * DV + values, c, mask=values < DV)
    if SLOTS == 2:
        store_block(base + (at + 1) * DK * DV, n_z, keys, values, DK, DV)
        if BIASED:
            tl.store(biases + (at + 1) * DV + values, n_c, mask=values < DV)
