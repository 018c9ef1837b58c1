"""The scan back: the gradient of the slots behind every mini-batch."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_numbers, load_rows, store_rows
from .inner import layer_input, loss_gradient, loss_gradient_gradient, slope, two_added
from .places import load_affine, load_mixing, load_rows_of, load_written, place_of, store_block
from .slots import load_slots, store_slots


@kernel("T batches curvature gain")
def retreat_kernel(
    q, k, v, mask, rows, written, kept, factor, gamma, beta, normals, rates, dy, dgradient, dlast, dlast_bias,
    ends, end_biases, dlayer, dv, dgamma, dbeta, dfirst, dfirst_bias, T, batches, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One head of one sequence a program. D_s: the gradient of Z_s after a mini-batch, d_s of its bias.

        dG <- dG + sum_s F_s * (K D_s + d_s),    dA of it (`loss_gradient_gradient`)
        D_l <- sum_s phi_sl D_s + Q^T (Q0_l * dY) + [l = 0] K^T dA,    d_l likewise with Q = K = 1

    normals, rates: of `outputs_gradient`. ends, end_biases: D and d behind every mini-batch, [N, batches, Hv, r, ...]. dlayer: dA,
    [tokens, Hv, dv], and dV = -gain de. dgamma, dbeta: of this sequence, through the loss, behind those of its mini-batches.
    """
    n = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
    at = (n * HV + head).to(tl.int64) * SLOTS
    d, c, n_d, n_c = load_slots(dlast, dlast_bias, at, keys, values, DK, DV, BV, SLOTS, BIASED)
    scaled = tl.zeros([BV], tl.float32)
    shifted = tl.zeros([BV], tl.float32)
    for step in tl.range(0, batches, num_stages=STAGES):
        batch = batches - 1 - step
        token = n.to(tl.int64) * T + batch * SIZE
        place = place_of(n, batch, batches, head, HV)
        query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        out = load_rows(dy + head * DV, token, t, valid, values, HV * DV, DV, BV).to(tl.float32)
        dg = load_rows(dgradient + head * DV, token, t, valid, values, HV * DV, DV, BV).to(tl.float32)
        operand = key.dtype
        normal = load_rows(normals + head * DV, token, t, valid, values, HV * DV, DV, BV)
        rate = load_numbers(rates, head, token, t, valid, HV, 1.0, NORM)[:, None]
        e = slope(normal, key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
        g, along = loss_gradient(e, normal, rate, scale, values, DV, BV, NORM)
        store_block(ends + place * SLOTS * DK * DV, d, keys, values, DK, DV)
        if BIASED:
            tl.store(end_biases + place * SLOTS * DV + values, c, mask=values < DV)
        f = load_written(mask, written, factor, place * SLOTS, head, token, t, valid, HV, SIZE)
        row = load_rows_of(rows, place * SLOTS, t, valid, SIZE)
        dg += f[:, None] * layer_input(d, c, key, BIASED, PRECISION)
        if SLOTS == 2:
            store_block(ends + (place * SLOTS + 1) * DK * DV, n_d, keys, values, DK, DV)
            n_f = load_written(mask, written, factor, place * SLOTS + 1, head, token, t, valid, HV, SIZE)
            dg += n_f[:, None] * layer_input(n_d, n_c, key, BIASED, PRECISION)
            own, across, back, moved = load_mixing(kept, place)
            d, n_d = own * d + back * n_d, across * d + moved * n_d
            read = load_rows_of(rows, place * SLOTS + 1, t, valid, SIZE)[:, None] * out
            n_d = tl.dot(tl.trans(query), read.to(operand), acc=n_d, input_precision=PRECISION)
            if BIASED:
                tl.store(end_biases + (place * SLOTS + 1) * DV + values, n_c, mask=values < DV)
                c, n_c = own * c + back * n_c, across * c + moved * n_c
                n_c += tl.sum(read, 0)
        elif kept is not None:
            own = tl.load(kept + place)
            d *= own
            c *= own
        de, da, by_row = loss_gradient_gradient(dg, g, along, e, normal, rate, scale, curvature, values, DV, BV, NORM)
        if NORM:
            by_scale, by_shift = tl.reduce((by_row, curvature * de), 0, two_added)
            scaled += by_scale
            shifted += by_shift
        store_rows(dlayer + head * DV, token, da, t, valid, values, HV * DV, DV, BV)
        store_rows(dv + head * DV, token, -gain * de, t, valid, values, HV * DV, DV, BV)
        read = row[:, None] * out
        d = tl.dot(tl.trans(query), read.to(operand), acc=d, input_precision=PRECISION)
        d = tl.dot(tl.trans(key), da.to(operand), acc=d, input_precision=PRECISION)
        if BIASED:
            c += tl.sum(read + da, 0)
    if NORM:
        here = place_of(n, batches, batches + 1, head, HV) * DV + values
        tl.store(dgamma + here, scaled, mask=values < DV)
        tl.store(dbeta + here, shifted, mask=values < DV)
    store_slots(dfirst, dfirst_bias, at, d, c, n_d, n_c, keys, values, DK, DV, SLOTS, BIASED)
