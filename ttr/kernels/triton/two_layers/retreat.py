"""The scan back: the gradient of the memory behind every mini-batch."""

import triton.language as tl

from ..launch import kernel
from ..mini_batch.inner import loss_gradient_gradient, mean, normalized, slope
from ..mini_batch.places import load_affine, place_of
from ..tiles import load_rows, product, store_rows
from .exchange import scan_place_of, summed
from .memory import affine, load_both_rows, load_both_slots, load_both_written, load_upper, mixed, slot_size, store_both_slots


@kernel("T batches heads begin count eps curvature gain")
def retreat_kernel(
    q, k, v, mask, rows, written, kept, factor, gamma, beta, starts, hidden, slopes, curved, predicted, upper, dout, read, dinner,
    dhidden, dlower, dupper, dmemory, ends, dlayer, dv, dgamma, dbeta, partial, arrived,
    T, batches, heads, begin, count, eps, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`count` mini-batches, back to `begin`; programs as in `advance`.

    With D_s, E_s the gradients of Z_s and Y_s behind a mini-batch (their biases with K = X = 1):

        dL <- dL + sum_s F_s * (K D_s),    dG = dL * a'(A),    dU <- dU + sum_s F_s * (X E_s) + dG Y_0
        dV = -gain de and dP, of the layer's output, from dU (`loss_gradient_gradient`)
        dX <- dX + sum_s F_s * (U E_s^T) + dP Y_0^T,           dA = dL * curved + dX * a'(A)
        D_l <- sum_s phi_sl D_s + Q^T (Q0_l * dA_q) + [l = 0] K^T dA
        E_l <- sum_s phi_sl E_s + B^T (Q0_l * dC) + [l = 0] (X^T dP + dG^T U)

    where dC and dA_q come of the queries (`readers`) and curved = (U Y_0^T) * a''(A) (`writers`). dmemory: D and E,
    [N, Hv, r, slot], float32, in place; ends: as they were behind every mini-batch, rounded as products take them. dhidden: from
    dX to dA; dlower: from dL to dG. dlayer: dP. dgamma, dbeta: added to what `readers` left there.
    """
    local, together, part, n, head = scan_place_of(heads, HV, PARTS)
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    units = part * BM + tl.arange(0, BM)
    valid = t < SIZE
    wide = slot_size(DK, DV, M, BIASED)
    grad = dmemory + (heads + local).to(tl.int64) * SLOTS * wide
    dz, dy, c, d, n_dz, n_dy, n_c, n_d = load_both_slots(grad, keys, units, values, DK, DV, M, BIASED, SLOTS)
    for back in tl.range(0, count, disable_licm=True):
        step = count - 1 - back
        batch = begin + step
        token = n.to(tl.int64) * T + batch * SIZE
        place = place_of(n, batch, batches, head, HV)
        own = local.to(tl.int64) + step * together
        here = own * SIZE
        end = ends + own * SLOTS * wide
        store_both_slots(end, dz, dy, c, d, n_dz, n_dy, n_c, n_d, keys, units, values, DK, DV, M, BIASED, SLOTS)
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        operand = key.dtype
        f, n_f = load_both_written(mask, written, factor, place, head, token, t, valid, HV, SIZE, SLOTS)
        x = load_rows(hidden, here, t, valid, units, M, M, BM)
        derivative = load_rows(slopes, here, t, valid, units, M, M, BM).to(tl.float32)
        y = load_upper(starts + own * SLOTS * wide, units, values, DK, DV, M)
        dl = load_rows(dlower, here, t, valid, units, M, M, BM).to(tl.float32)
        dl += f[:, None] * affine(key, dz, c, PRECISION)
        du = f[:, None] * product(x, dy.to(operand), PRECISION)
        if SLOTS == 2:
            dl += n_f[:, None] * affine(key, n_dz, n_c, PRECISION)
            du += n_f[:, None] * product(x, n_dy.to(operand), PRECISION)
        dg = (dl * derivative).to(operand)
        tl.debug_barrier()  # all have read what lay there
        store_rows(dlower, here, dg, t, valid, units, M, M, BM)
        du = tl.dot(dg, y, acc=du, input_precision=PRECISION)
        du = summed(du, partial, arrived, back, part, local, t, values, ROWS, BV, PARTS)
        if BIASED:
            du += f[:, None] * d[None, :]
            if SLOTS == 2:
                du += n_f[:, None] * n_d[None, :]
        du += load_rows(dupper, here, t, valid, values, DV, DV, BV).to(tl.float32)
        u = load_rows(upper, here, t, valid, values, DV, DV, BV)
        a = load_rows(predicted, here, t, valid, values, DV, DV, BV)
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        own_key = load_rows(k + head // (HV // H) * DK, token, t, valid, values, H * DK, DK, BV)  # the residual, if there is one
        scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
        normal, rate = normalized(a, values, eps, DV, BV, NORM)
        e = slope(normal, own_key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
        along = mean(e * scale[None, :] * normal, DV) if NORM else rate
        de, dp, by_row = loss_gradient_gradient(
            du, u.to(tl.float32), along, e, normal, rate, scale, curvature, values, DV, BV, NORM
        )  # fmt: skip
        by_scale = tl.sum(by_row, 0)
        if part == 0:
            store_rows(dlayer, here, dp, t, valid, values, DV, DV, BV)
            store_rows(dv + head * DV, token, -gain * de, t, valid, values, HV * DV, DV, BV)
            if NORM:
                at = place * DV + values
                by_shift = tl.sum(curvature * de, 0)
                tl.store(dgamma + at, tl.load(dgamma + at, mask=values < DV, other=0.0) + by_scale, mask=values < DV)
                tl.store(dbeta + at, tl.load(dbeta + at, mask=values < DV, other=0.0) + by_shift, mask=values < DV)
        dp = dp.to(operand)
        given = load_rows(dhidden, here, t, valid, units, M, M, BM).to(tl.float32)
        given = tl.dot(dp, tl.trans(y), acc=given, input_precision=PRECISION)
        given += f[:, None] * product(u, tl.trans(dy.to(operand)), PRECISION)
        if SLOTS == 2:
            given += n_f[:, None] * product(u, tl.trans(n_dy.to(operand)), PRECISION)
        curve = load_rows(curved, here, t, valid, units, M, M, BM).to(tl.float32)
        da = (dl * curve + given * derivative).to(operand)
        tl.debug_barrier()  # all have read what lay there
        store_rows(dhidden, here, da, t, valid, units, M, M, BM)
        row, n_row = load_both_rows(rows, place, t, valid, SIZE, SLOTS)
        asked = load_rows(dinner, here, t, valid, units, M, M, BM).to(tl.float32)
        query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        dz, n_dz = mixed(kept, place, dz, n_dz, SLOTS, True)
        dz = tl.dot(tl.trans(query), (row[:, None] * asked).to(operand), acc=dz, input_precision=PRECISION)
        dz = tl.dot(tl.trans(key), da, acc=dz, input_precision=PRECISION)
        out = load_rows(dout, here, t, valid, values, DV, DV, BV).to(tl.float32)
        seen = row[:, None] * out
        b = load_rows(read, here, t, valid, units, M, M, BM)
        dg = load_rows(dlower, here, t, valid, units, M, M, BM)  # Triton 3.6 miscompiles a product's transpose as an operand
        dy, n_dy = mixed(kept, place, dy, n_dy, SLOTS, True)
        dy = tl.dot(tl.trans(b), seen.to(operand), acc=dy, input_precision=PRECISION)
        dy = tl.dot(tl.trans(x), dp, acc=dy, input_precision=PRECISION)
        dy = tl.dot(tl.trans(dg), u, acc=dy, input_precision=PRECISION)
        if BIASED:
            c, n_c = mixed(kept, place, c, n_c, SLOTS, True)
            d, n_d = mixed(kept, place, d, n_d, SLOTS, True)
            c += tl.sum(row[:, None] * asked, 0) + tl.sum(da.to(tl.float32), 0)
            d += tl.sum(seen, 0) + tl.sum(dp.to(tl.float32), 0)
        if SLOTS == 2:
            seen = n_row[:, None] * out
            n_dz = tl.dot(tl.trans(query), (n_row[:, None] * asked).to(operand), acc=n_dz, input_precision=PRECISION)
            n_dy = tl.dot(tl.trans(b), seen.to(operand), acc=n_dy, input_precision=PRECISION)
            if BIASED:
                n_c += tl.sum(n_row[:, None] * asked, 0)
                n_d += tl.sum(seen, 0)
    store_both_slots(grad, dz, dy, c, d, n_dz, n_dy, n_c, n_d, keys, units, values, DK, DV, M, BIASED, SLOTS)
