"""Device functions: a slot of the memory, a row of numbers Z [dk, m], Y [m, dv], c [m], d [dv], and where programs find their own."""

import triton
import triton.language as tl

from ..mini_batch.places import load_mixing, load_rows_of, load_written, place_of, store_block
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
def load_slot(slot, keys, units, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr):
    """Z, Y and c of some hidden units, and d."""
    return (
        load_lower(slot, keys, units, DK, M),
        load_upper(slot, units, values, DK, DV, M),
        load_lower_bias(slot, units, DK, DV, M, BIASED),
        load_upper_bias(slot, values, DK, DV, M, BIASED),
    )


@triton.jit
def store_slot(slot, z, y, c, d, keys, units, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr):
    """The inverse of `load_slot`, rounded to what is there; every program that holds d writes the same."""
    store_block(slot, z, keys, units, DK, M)
    store_block(slot + DK * M, y, units, values, M, DV)
    if BIASED:
        biases = slot + DK * M + M * DV
        tl.store(biases + units, c.to(slot.dtype.element_ty), mask=units < M)
        tl.store(biases + M + values, d.to(slot.dtype.element_ty), mask=values < DV)


@triton.jit
def load_both_slots(
    memory, keys, units, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BIASED: tl.constexpr, SLOTS: tl.constexpr
):
    """`load_slot` of both slots, or of the one twice."""
    z, y, c, d = load_slot(memory, keys, units, values, DK, DV, M, BIASED)
    if SLOTS == 2:
        n_z, n_y, n_c, n_d = load_slot(memory + slot_size(DK, DV, M, BIASED), keys, units, values, DK, DV, M, BIASED)
        return z, y, c, d, n_z, n_y, n_c, n_d
    else:
        return z, y, c, d, z, y, c, d


@triton.jit
def store_both_slots(
    memory, z, y, c, d, n_z, n_y, n_c, n_d, keys, units, values, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    BIASED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_both_slots`."""
    store_slot(memory, z, y, c, d, keys, units, values, DK, DV, M, BIASED)
    if SLOTS == 2:
        store_slot(memory + slot_size(DK, DV, M, BIASED), n_z, n_y, n_c, n_d, keys, units, values, DK, DV, M, BIASED)


@triton.jit
def affine(x, weight, bias, PRECISION: tl.constexpr):
    """x weight + bias, the weights rounded to x's type, as they are kept for backward."""
    return product(x, weight.to(x.dtype), PRECISION) + bias.to(x.dtype).to(tl.float32)[None, :]


@triton.jit
def mixed(kept, place, x, n_x, SLOTS: tl.constexpr, BACK: tl.constexpr = False):
    """sum_l phi_sl x_l of both slots, or of the one; BACK: sum_s phi_sl x_s."""
    if SLOTS == 2:
        own, across, back, moved = load_mixing(kept, place)
        if BACK:
            return own * x + back * n_x, across * x + moved * n_x
        else:
            return own * x + across * n_x, back * x + moved * n_x
    elif kept is not None:
        return tl.load(kept + place) * x, n_x
    else:
        return x, n_x


@triton.jit
def load_both_written(
    mask, written, factor, place, head, token, t, valid, HV: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """F of both slots, [ROWS], or of the one twice."""
    f = load_written(mask, written, factor, place * SLOTS, head, token, t, valid, HV, SIZE)
    if SLOTS == 2:
        return f, load_written(mask, written, factor, place * SLOTS + 1, head, token, t, valid, HV, SIZE)
    else:
        return f, f


@triton.jit
def load_both_rows(rows, place, t, valid, SIZE: tl.constexpr, SLOTS: tl.constexpr):
    """Q0 of both slots, [ROWS], or of the one twice."""
    row = load_rows_of(rows, place * SLOTS, t, valid, SIZE)
    if SLOTS == 2:
        return row, load_rows_of(rows, place * SLOTS + 1, t, valid, SIZE)
    else:
        return row, row


@triton.jit
def group_batch_of(T, batches, heads, together, begin, HV: tl.constexpr, SIZE: tl.constexpr):
    """Of a program in a grid of (mini-batches of the group x its heads), which are `together` and the first of them is `heads`.

    Its head, its first token, its place among all mini-batches, and that among the group's.
    """
    own = tl.program_id(0).to(tl.int64)
    n = (heads + own % together) // HV
    head = (heads + own % together) % HV
    batch = begin + own // together
    return head, n * T + batch * SIZE, place_of(n, batch, batches, head, HV), own
