"""What the writes give back: to k and v, to F and phi, and to the norm."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_block, load_numbers, load_rows, store_rows
from .inner import layer_input, loss_gradient, loss_gradient_gradient, normalized, slope
from .places import load_affine, load_factor, load_written, place_of


@kernel("T batches eps curvature gain")
def written_gradient_kernel(
    k, v, mask, written, factor, gamma, beta, starts, start_biases, ends, end_biases, dgradient, dk, dv, dwritten, dkept, dfactor,
    dgamma, dbeta,
    T, batches, eps, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program; its gradients G are made again.

        dG <- dG + sum_s F_s * (K D_s + d_s),   dF_s = <G, K D_s + d_s>,   dphi_sl = <D_s, Z_l> + <d_s, c_l>
        dK <- dK + sum_s (F_s * G) D_s^T + dA Z_0^T [+ dF/df],   dV = -gain de

    dk: added to what `outputs_gradient` left there, dgamma and dbeta likewise.
    """
    n = tl.program_id(0) // batches
    batch = tl.program_id(0) % batches
    head = tl.program_id(1)
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    inside = values < DV
    token = n.to(tl.int64) * T + batch * SIZE
    place = place_of(n, batch, batches, head, HV)
    scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
    dg = load_rows(dgradient + head * DV, token, t, valid, values, HV * DV, DV, BV).to(tl.float32)
    operand = key.dtype
    z = load_block(starts + place * SLOTS * DK * DV, keys, values, DK, DV)
    bias = tl.zeros([BV], tl.float32)
    if BIASED:
        bias = tl.load(start_biases + place * SLOTS * DV + values, mask=inside, other=0.0)
    normal, rate = normalized(layer_input(z, bias, key, BIASED, PRECISION), values, eps, DV, BV, NORM)
    e = slope(normal, key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
    g = loss_gradient(e, normal, rate, scale, values, DV, BV, NORM)
    x = load_rows(dk + head * DK, token, t, valid, keys, HV * DK, DK, BK).to(tl.float32)
    for s in tl.static_range(SLOTS):
        at = place * SLOTS + s
        d = load_block(ends + at * DK * DV, keys, values, DK, DV)
        c = tl.zeros([BV], tl.float32)
        if BIASED:
            c = tl.load(end_biases + at * DV + values, mask=inside, other=0.0)
        f = load_written(mask, written, factor, at, head, token, t, valid, HV, SIZE)
        moved = layer_input(d, c, key, BIASED, PRECISION)
        dg += f[:, None] * moved
        felt = tl.sum(g * moved, 1)
        if mask is None:
            b = load_numbers(written, head, token, t, valid, HV, 0.0, True)
            _, final = load_factor(factor, head, t, valid, SIZE)
            here = dwritten + (token + t) * HV + head
            tl.store(here, tl.load(here, mask=valid, other=0.0) + felt * final, mask=valid)
            if factor is not None:
                ending = dfactor + place * SIZE + SIZE - 1
                tl.store(ending, tl.load(ending) + tl.sum(tl.where(valid, felt * b, 0.0), 0))
        else:
            tl.store(dwritten + at * SIZE + t, felt, mask=valid)
        x = tl.dot((f[:, None] * g).to(operand), tl.trans(d.to(operand)), acc=x, input_precision=PRECISION)
        for other in tl.static_range(SLOTS if dkept is not None else 0):
            before = load_block(starts + (place * SLOTS + other) * DK * DV, keys, values, DK, DV)
            total = tl.sum(tl.sum(d.to(tl.float32) * before.to(tl.float32), 1), 0)
            if BIASED:
                total += tl.sum(c * tl.load(start_biases + (place * SLOTS + other) * DV + values, mask=inside, other=0.0), 0)
            tl.store(dkept + at * SLOTS + other, total)
    de, da, own = loss_gradient_gradient(dg, g, e, normal, rate, scale, curvature, values, DV, BV, NORM)
    x = tl.dot(da.to(operand), tl.trans(z.to(operand)), acc=x, input_precision=PRECISION)
    if RESIDUAL:
        x += curvature * de
    store_rows(dk + head * DK, token, x, t, valid, keys, HV * DK, DK, BK)
    store_rows(dv + head * DV, token, -gain * de, t, valid, values, HV * DV, DV, BV)
    if NORM:
        here = place * DV + values
        tl.store(dgamma + here, tl.load(dgamma + here, mask=inside, other=0.0) + own, mask=inside)
        shifted = tl.load(dbeta + here, mask=inside, other=0.0) + tl.sum(curvature * de, 0)
        tl.store(dbeta + here, shifted, mask=inside)
