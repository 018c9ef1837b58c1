"""The scan over mini-batches: where each begins, and its gradients."""

import triton
import triton.language as tl

from ..launch import kernel
from ..mini_batch.inner import loss_gradient, normalized, slope
from ..mini_batch.places import load_affine, load_mixing, load_written, place_of
from ..tiles import load_rows, product, store_rows
from .activations import activation, activation_derivatives
from .memory import (
    affine,
    load_lower,
    load_lower_bias,
    load_upper,
    load_upper_bias,
    slot_size,
    store_lower,
    store_lower_bias,
    store_upper,
    store_upper_bias,
)


@triton.jit
def mixed(kept, place, x, n_x, SLOTS: tl.constexpr):
    """sum_l phi_sl x_l of both slots, or of the one."""
    if SLOTS == 2:
        own, across, back, moved = load_mixing(kept, place)
        return own * x + across * n_x, back * x + moved * n_x
    elif kept is not None:
        return tl.load(kept + place) * x, n_x
    else:
        return x, n_x


@kernel("T batches begin count eps curvature gain")
def advance_kernel(
    k, v, mask, written, kept, factor, gamma, beta, memory, starts, hidden, lower, upper,
    T, batches, begin, count, eps, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`count` mini-batches, from `begin` on, of one head of one sequence a program.

    memory: [N, Hv, r, slot], float32, in place. starts: the same before every mini-batch, [N, count, Hv, r, slot]. hidden,
    lower, upper: X, L and U, [N, tokens of the group, Hv, m or dv].
    """
    n = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    wide = slot_size(DK, DV, M, BIASED)
    slot = memory + (n * HV + head).to(tl.int64) * SLOTS * wide
    n_slot = slot + wide if SLOTS == 2 else slot
    for step in range(0, count):
        batch = begin + step
        token = n.to(tl.int64) * T + batch * SIZE
        here = (n.to(tl.int64) * count + step) * SIZE  # among the group's tokens
        place = place_of(n, batch, batches, head, HV)
        start = starts + place_of(n, step, count, head, HV) * SLOTS * wide
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        d = load_upper_bias(slot, values, DK, DV, M, BIASED)
        a = tl.zeros([ROWS, BV], tl.float32) + d.to(key.dtype).to(tl.float32)[None, :]
        for first in tl.range(0, M, BM, num_stages=STAGES):
            units = first + tl.arange(0, BM)
            z = load_lower(slot, keys, units, DK, M)
            x = activation(affine(key, z, load_lower_bias(slot, units, DK, DV, M, BIASED), PRECISION), ACTIVATION).to(key.dtype)
            store_rows(hidden + head * M, here, x, t, valid, units, HV * M, M, BM)
            y = load_upper(slot, units, values, DK, DV, M).to(key.dtype)
            a = tl.dot(x, y, acc=a, input_precision=PRECISION)
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        scale, shift = load_affine(gamma, beta, head, values, DV, NORM)  # here, for they take registers
        normal, rate = normalized(a, values, eps, DV, BV, NORM)
        e = slope(normal, key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
        u = loss_gradient(e, normal, rate, scale, values, DV, BV, NORM).to(key.dtype)
        store_rows(upper + head * DV, here, u, t, valid, values, HV * DV, DV, BV)
        f = load_written(mask, written, factor, place * SLOTS, head, token, t, valid, HV, SIZE)
        write = (f[:, None] * u.to(tl.float32)).to(key.dtype)
        n_f = f
        n_write = write
        if SLOTS == 2:
            n_f = load_written(mask, written, factor, place * SLOTS + 1, head, token, t, valid, HV, SIZE)
            n_write = (n_f[:, None] * u.to(tl.float32)).to(key.dtype)
        n_d = d
        if SLOTS == 2:
            n_d = load_upper_bias(n_slot, values, DK, DV, M, BIASED)
        tl.debug_barrier()  # what one thread wrote (X), the others read, and all have read what is now written
        if BIASED:
            store_upper_bias(start, d, values, DK, DV, M)
            moved, n_moved = mixed(kept, place, d, n_d, SLOTS)
            store_upper_bias(slot, moved + tl.sum(f[:, None] * u.to(tl.float32), 0), values, DK, DV, M)
            if SLOTS == 2:
                store_upper_bias(start + wide, n_d, values, DK, DV, M)
                store_upper_bias(n_slot, n_moved + tl.sum(n_f[:, None] * u.to(tl.float32), 0), values, DK, DV, M)
        for first in tl.range(0, M, BM, num_stages=STAGES):
            units = first + tl.arange(0, BM)
            z = load_lower(slot, keys, units, DK, M)
            y = load_upper(slot, units, values, DK, DV, M).to(key.dtype)
            c = load_lower_bias(slot, units, DK, DV, M, BIASED)
            store_lower(start, z, keys, units, DK, M)
            _x, dx, _ddx = activation_derivatives(affine(key, z, c, PRECISION), ACTIVATION)
            l = (product(u, tl.trans(y), PRECISION) * dx).to(key.dtype)
            store_rows(lower + head * M, here, l, t, valid, units, HV * M, M, BM)
            l = l.to(tl.float32)
            n_z = z
            n_c = c
            if SLOTS == 2:
                n_z = load_lower(n_slot, keys, units, DK, M)
                n_c = load_lower_bias(n_slot, units, DK, DV, M, BIASED)
                store_lower(start + wide, n_z, keys, units, DK, M)
            if BIASED:
                store_lower_bias(start, c, units, DK, DV, M)
                if SLOTS == 2:
                    store_lower_bias(start + wide, n_c, units, DK, DV, M)
            tl.debug_barrier()  # all have read what is now written
            z, n_z = mixed(kept, place, z, n_z, SLOTS)
            z = tl.dot(tl.trans(key), (f[:, None] * l).to(key.dtype), acc=z, input_precision=PRECISION)
            store_lower(slot, z, keys, units, DK, M)
            if SLOTS == 2:
                n_z = tl.dot(tl.trans(key), (n_f[:, None] * l).to(key.dtype), acc=n_z, input_precision=PRECISION)
                store_lower(n_slot, n_z, keys, units, DK, M)
            if BIASED:
                c, n_c = mixed(kept, place, c, n_c, SLOTS)
                store_lower_bias(slot, c + tl.sum(f[:, None] * l, 0), units, DK, DV, M)
                if SLOTS == 2:
                    store_lower_bias(n_slot, n_c + tl.sum(n_f[:, None] * l, 0), units, DK, DV, M)
        for first in tl.range(0, M, BM, num_stages=STAGES):
            units = first + tl.arange(0, BM)
            x = load_rows(hidden + head * M, here, t, valid, units, HV * M, M, BM)
            y = load_upper(slot, units, values, DK, DV, M)
            store_upper(start, y, units, values, DK, DV, M)
            n_y = y
            if SLOTS == 2:
                n_y = load_upper(n_slot, units, values, DK, DV, M)
                store_upper(start + wide, n_y, units, values, DK, DV, M)
            tl.debug_barrier()
            y, n_y = mixed(kept, place, y, n_y, SLOTS)
            store_upper(slot, tl.dot(tl.trans(x), write, acc=y, input_precision=PRECISION), units, values, DK, DV, M)
            if SLOTS == 2:
                n_y = tl.dot(tl.trans(x), n_write, acc=n_y, input_precision=PRECISION)
                store_upper(n_slot, n_y, units, values, DK, DV, M)
        tl.debug_barrier()  # before the next mini-batch reads what this one wrote
