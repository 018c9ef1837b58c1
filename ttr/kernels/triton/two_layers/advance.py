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
    load_layers,
    load_lower_bias,
    load_upper_bias,
    slot_size,
    store_layers,
    store_lower_bias,
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
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
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
    scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
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
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        d = load_upper_bias(slot, values, DK, DV, M, BIASED)
        a = tl.zeros([ROWS, BV], tl.float32) + d.to(key.dtype).to(tl.float32)[None, :]
        for first in range(0, M, BM):
            units = first + tl.arange(0, BM)
            z, y = load_layers(slot, keys, units, values, DK, DV, M)
            x = activation(affine(key, z, load_lower_bias(slot, units, DK, DV, M, BIASED), PRECISION), ACTIVATION)
            a = tl.dot(x.to(key.dtype), y.to(key.dtype), acc=a, input_precision=PRECISION)
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
        if BIASED:
            n_d = load_upper_bias(n_slot, values, DK, DV, M, BIASED)
            store_upper_bias(start, d, values, DK, DV, M)
            tl.debug_barrier()  # what one thread wrote, the others read
            moved, n_moved = mixed(kept, place, d, n_d, SLOTS)
            store_upper_bias(slot, moved + tl.sum(f[:, None] * u.to(tl.float32), 0), values, DK, DV, M)
            if SLOTS == 2:
                store_upper_bias(start + wide, n_d, values, DK, DV, M)
                store_upper_bias(n_slot, n_moved + tl.sum(n_f[:, None] * u.to(tl.float32), 0), values, DK, DV, M)
        for first in range(0, M, BM):
            units = first + tl.arange(0, BM)
            z, y = load_layers(slot, keys, units, values, DK, DV, M)
            c = load_lower_bias(slot, units, DK, DV, M, BIASED)
            store_layers(start, z, y, keys, units, values, DK, DV, M)
            x, dx, _ = activation_derivatives(affine(key, z, c, PRECISION), ACTIVATION)
            l = (product(u, tl.trans(y.to(key.dtype)), PRECISION) * dx).to(key.dtype)
            store_rows(hidden + head * M, here, x, t, valid, units, HV * M, M, BM)
            store_rows(lower + head * M, here, l, t, valid, units, HV * M, M, BM)
            # X^T made anew: Triton 3.6 miscompiles a product's transpose as an operand
            inputs = product(tl.trans(z.to(key.dtype)), tl.trans(key), PRECISION) + c.to(key.dtype).to(tl.float32)[:, None]
            inputs = activation(inputs, ACTIVATION).to(key.dtype)
            l = l.to(tl.float32)
            n_z = z
            n_y = y
            n_c = c
            if SLOTS == 2:
                n_z, n_y = load_layers(n_slot, keys, units, values, DK, DV, M)
                store_layers(start + wide, n_z, n_y, keys, units, values, DK, DV, M)
            z, n_z = mixed(kept, place, z, n_z, SLOTS)
            y, n_y = mixed(kept, place, y, n_y, SLOTS)
            z = tl.dot(tl.trans(key), (f[:, None] * l).to(key.dtype), acc=z, input_precision=PRECISION)
            y = tl.dot(inputs, write, acc=y, input_precision=PRECISION)
            if SLOTS == 2:
                n_z = tl.dot(tl.trans(key), (n_f[:, None] * l).to(key.dtype), acc=n_z, input_precision=PRECISION)
                n_y = tl.dot(inputs, n_write, acc=n_y, input_precision=PRECISION)
            if BIASED:
                store_lower_bias(start, c, units, DK, DV, M)
                if SLOTS == 2:
                    n_c = load_lower_bias(n_slot, units, DK, DV, M, BIASED)
                    store_lower_bias(start + wide, n_c, units, DK, DV, M)
            tl.debug_barrier()  # all have read what is now written
            if BIASED:
                c, n_c = mixed(kept, place, c, n_c, SLOTS)
                store_lower_bias(slot, c + tl.sum(f[:, None] * l, 0), units, DK, DV, M)
                if SLOTS == 2:
                    store_lower_bias(n_slot, n_c + tl.sum(n_f[:, None] * l, 0), units, DK, DV, M)
            store_layers(slot, z, y, keys, units, values, DK, DV, M)
            if SLOTS == 2:
                store_layers(n_slot, n_z, n_y, keys, units, values, DK, DV, M)
        tl.debug_barrier()  # before the next mini-batch reads what this one wrote
