"""The scan back: the gradient of the memory behind every mini-batch."""

import triton
import triton.language as tl

from ..launch import kernel
from ..mini_batch.inner import loss_gradient_gradient, normalized, slope
from ..mini_batch.places import load_affine, load_mixing, load_rows_of, load_written, place_of
from ..tiles import load_rows, product, store_rows
from .activations import activation_derivatives
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
def mixed_back(kept, place, x, n_x, SLOTS: tl.constexpr):
    """sum_s phi_sl x_s of both slots, or of the one."""
    if SLOTS == 2:
        own, across, back, moved = load_mixing(kept, place)
        return own * x + back * n_x, across * x + moved * n_x
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


@kernel("T batches begin count eps curvature gain")
def retreat_kernel(
    q, k, v, mask, rows, written, kept, factor, gamma, beta, starts, hidden, upper, dout, read, dinner, dhidden, dlower, dupper,
    dmemory, ends, dweighed, dlayer, dv, dgamma, dbeta, T, batches, begin, count, eps, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`count` mini-batches, back to `begin`, of one head of one sequence a program.

    With D_s, E_s the gradients of Z_s and Y_s behind a mini-batch (their biases with K = X = 1), G = U Y_0^T, A = K Z_0 + c_0:

        dL <- dL + sum_s F_s * (K D_s),    dG = dL * a'(A),    dU <- dU + sum_s F_s * (X E_s) + dG Y_0
        dV = -gain de and dP, of the layer's output, from dU (`loss_gradient_gradient`)
        dX <- dX + sum_s (F_s * U) E_s^T + dP Y_0^T,           dA = dL * G * a''(A) + dX * a'(A)
        D_l <- sum_s phi_sl D_s + Q^T (Q0_l * dA_q) + [l = 0] K^T dA
        E_l <- sum_s phi_sl E_s + B^T (Q0_l * dC) + [l = 0] (X^T dP + dG^T U)

    where dC and dA_q come of the queries (`readers`). dmemory: D and E, [N, Hv, r, slot], float32, in place; ends: as they were
    behind every mini-batch. dhidden: from dX to dA; dlower: dL; dweighed: dG; dlayer: dP. dgamma, dbeta: added to what `readers`
    left there.
    """
    n = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    wide: tl.constexpr = slot_size(DK, DV, M, BIASED)
    grad = dmemory + (n * HV + head).to(tl.int64) * SLOTS * wide
    n_grad = grad + wide if SLOTS == 2 else grad
    for back in tl.range(0, count, disable_licm=True):
        step = count - 1 - back
        batch = begin + step
        token = n.to(tl.int64) * T + batch * SIZE
        here = (n.to(tl.int64) * count + step) * SIZE
        place = place_of(n, batch, batches, head, HV)
        own = place_of(n, step, count, head, HV) * SLOTS * wide
        start, end = starts + own, ends + own
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        operand = key.dtype
        a = tl.zeros([ROWS, BV], tl.float32)
        du = tl.zeros([ROWS, BV], tl.float32)
        for first in tl.range(0, M, BM, num_stages=STAGES, disable_licm=True):
            units = first + tl.arange(0, BM)
            z = load_lower(start, keys, units, DK, M)
            y = load_upper(start, units, values, DK, DV, M)
            c = load_lower_bias(start, units, DK, DV, M, BIASED)
            x, dx, _ddx = activation_derivatives(affine(key, z, c, PRECISION), ACTIVATION)
            x = x.to(operand)
            a = tl.dot(x, y, acc=a, input_precision=PRECISION)
            f, n_f = load_both_written(mask, written, factor, place, head, token, t, valid, HV, SIZE, SLOTS)
            dl = load_rows(dlower + head * M, here, t, valid, units, HV * M, M, BM).to(tl.float32)
            dz = load_lower(grad, keys, units, DK, M)
            dl += f[:, None] * affine(key, dz, load_lower_bias(grad, units, DK, DV, M, BIASED), PRECISION)
            dy = load_upper(grad, units, values, DK, DV, M)
            du += f[:, None] * product(x, dy.to(operand), PRECISION)
            if SLOTS == 2:
                n_dz = load_lower(n_grad, keys, units, DK, M)
                dl += n_f[:, None] * affine(key, n_dz, load_lower_bias(n_grad, units, DK, DV, M, BIASED), PRECISION)
                n_dy = load_upper(n_grad, units, values, DK, DV, M)
                du += n_f[:, None] * product(x, n_dy.to(operand), PRECISION)
            dg = (dl * dx).to(operand)
            du = tl.dot(dg, y, acc=du, input_precision=PRECISION)
            store_rows(dlower + head * M, here, dl, t, valid, units, HV * M, M, BM)
            store_rows(dweighed + head * M, here, dg, t, valid, units, HV * M, M, BM)
        # from here on what the loop did not need: registers are short
        u = load_rows(upper + head * DV, here, t, valid, values, HV * DV, DV, BV)
        d = load_upper_bias(grad, values, DK, DV, M, BIASED)
        n_d = d
        if BIASED:
            a += load_upper_bias(start, values, DK, DV, M, BIASED)[None, :]
            f, n_f = load_both_written(mask, written, factor, place, head, token, t, valid, HV, SIZE, SLOTS)
            du += f[:, None] * d[None, :]
            if SLOTS == 2:
                n_d = load_upper_bias(n_grad, values, DK, DV, M, BIASED)
                du += n_f[:, None] * n_d[None, :]
        du += load_rows(dupper + head * DV, here, t, valid, values, HV * DV, DV, BV).to(tl.float32)
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
        normal, rate = normalized(a, values, eps, DV, BV, NORM)
        own_key = load_rows(k + head // (HV // H) * DK, token, t, valid, values, H * DK, DK, BV)  # the residual, if there is one
        e = slope(normal, own_key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
        de, dp, through = loss_gradient_gradient(du, u.to(tl.float32), e, normal, rate, scale, curvature, values, DV, BV, NORM)
        dp = dp.to(operand)
        store_rows(dlayer + head * DV, here, dp, t, valid, values, HV * DV, DV, BV)
        store_rows(dv + head * DV, token, -gain * de, t, valid, values, HV * DV, DV, BV)
        if NORM:
            at = place * DV + values
            tl.store(dgamma + at, tl.load(dgamma + at, mask=values < DV, other=0.0) + through, mask=values < DV)
            through = tl.sum(curvature * de, 0)
            tl.store(dbeta + at, tl.load(dbeta + at, mask=values < DV, other=0.0) + through, mask=values < DV)
        tl.debug_barrier()  # what one thread wrote, the others read
        row = load_rows_of(rows, place * SLOTS, t, valid, SIZE)
        n_row = row
        if SLOTS == 2:
            n_row = load_rows_of(rows, place * SLOTS + 1, t, valid, SIZE)
        query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        for first in tl.range(0, M, BM, num_stages=STAGES, disable_licm=True):
            units = first + tl.arange(0, BM)
            z = load_lower(start, keys, units, DK, M)
            y = load_upper(start, units, values, DK, DV, M)
            c = load_lower_bias(start, units, DK, DV, M, BIASED)
            _x, dx, ddx = activation_derivatives(affine(key, z, c, PRECISION), ACTIVATION)
            given = load_rows(dhidden + head * M, here, t, valid, units, HV * M, M, BM).to(tl.float32)
            given = tl.dot(dp, tl.trans(y), acc=given, input_precision=PRECISION)
            dy = load_upper(grad, units, values, DK, DV, M).to(operand)
            f, n_f = load_both_written(mask, written, factor, place, head, token, t, valid, HV, SIZE, SLOTS)
            given += f[:, None] * product(u, tl.trans(dy), PRECISION)
            if SLOTS == 2:
                n_dy = load_upper(n_grad, units, values, DK, DV, M).to(operand)
                given += n_f[:, None] * product(u, tl.trans(n_dy), PRECISION)
            dl = load_rows(dlower + head * M, here, t, valid, units, HV * M, M, BM).to(tl.float32)
            da = (dl * product(u, tl.trans(y), PRECISION) * ddx + given * dx).to(operand)
            asked = load_rows(dinner + head * M, here, t, valid, units, HV * M, M, BM).to(tl.float32)
            dz = load_lower(grad, keys, units, DK, M)
            c = load_lower_bias(grad, units, DK, DV, M, BIASED)
            store_lower(end, dz, keys, units, DK, M)
            n_dz = dz
            n_c = c
            if SLOTS == 2:
                n_dz = load_lower(n_grad, keys, units, DK, M)
                n_c = load_lower_bias(n_grad, units, DK, DV, M, BIASED)
                store_lower(end + wide, n_dz, keys, units, DK, M)
            if BIASED:
                store_lower_bias(end, c, units, DK, DV, M)
                if SLOTS == 2:
                    store_lower_bias(end + wide, n_c, units, DK, DV, M)
            tl.debug_barrier()  # all have read what is now written
            store_rows(dhidden + head * M, here, da, t, valid, units, HV * M, M, BM)
            dz, n_dz = mixed_back(kept, place, dz, n_dz, SLOTS)
            dz = tl.dot(tl.trans(query), (row[:, None] * asked).to(operand), acc=dz, input_precision=PRECISION)
            dz = tl.dot(tl.trans(key), da, acc=dz, input_precision=PRECISION)
            store_lower(grad, dz, keys, units, DK, M)
            if SLOTS == 2:
                n_dz = tl.dot(tl.trans(query), (n_row[:, None] * asked).to(operand), acc=n_dz, input_precision=PRECISION)
                store_lower(n_grad, n_dz, keys, units, DK, M)
            if BIASED:
                c, n_c = mixed_back(kept, place, c, n_c, SLOTS)
                c += tl.sum(row[:, None] * asked, 0) + tl.sum(da.to(tl.float32), 0)
                store_lower_bias(grad, c, units, DK, DV, M)
                if SLOTS == 2:
                    store_lower_bias(n_grad, n_c + tl.sum(n_row[:, None] * asked, 0), units, DK, DV, M)
        out = load_rows(dout + head * DV, here, t, valid, values, HV * DV, DV, BV).to(tl.float32)
        seen = row[:, None] * out
        n_seen = seen
        if SLOTS == 2:
            n_seen = n_row[:, None] * out
        if BIASED:  # all have read d: the loop had barriers
            store_upper_bias(end, d, values, DK, DV, M)
            moved, n_moved = mixed_back(kept, place, d, n_d, SLOTS)
            store_upper_bias(grad, moved + tl.sum(seen, 0) + tl.sum(dp.to(tl.float32), 0), values, DK, DV, M)
            if SLOTS == 2:
                store_upper_bias(end + wide, n_d, values, DK, DV, M)
                store_upper_bias(n_grad, n_moved + tl.sum(n_seen, 0), values, DK, DV, M)
        seen = seen.to(operand)
        n_seen = n_seen.to(operand)
        for first in tl.range(0, M, BM, num_stages=STAGES, disable_licm=True):
            units = first + tl.arange(0, BM)
            x = load_rows(hidden + head * M, here, t, valid, units, HV * M, M, BM)
            b = load_rows(read + head * M, here, t, valid, units, HV * M, M, BM)
            dg = load_rows(dweighed + head * M, here, t, valid, units, HV * M, M, BM)
            dy = load_upper(grad, units, values, DK, DV, M)
            store_upper(end, dy, units, values, DK, DV, M)
            n_dy = dy
            if SLOTS == 2:
                n_dy = load_upper(n_grad, units, values, DK, DV, M)
                store_upper(end + wide, n_dy, units, values, DK, DV, M)
            tl.debug_barrier()
            dy, n_dy = mixed_back(kept, place, dy, n_dy, SLOTS)
            dy = tl.dot(tl.trans(b), seen, acc=dy, input_precision=PRECISION)
            dy = tl.dot(tl.trans(x), dp, acc=dy, input_precision=PRECISION)
            dy = tl.dot(tl.trans(dg), u, acc=dy, input_precision=PRECISION)
            store_upper(grad, dy, units, values, DK, DV, M)
            if SLOTS == 2:
                n_dy = tl.dot(tl.trans(b), n_seen, acc=n_dy, input_precision=PRECISION)
                store_upper(n_grad, n_dy, units, values, DK, DV, M)
        tl.debug_barrier()  # before the next mini-batch reads what this one wrote
