"""What the writes give back: to k, to F and phi."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_block, load_numbers, load_rows, store_rows
from .inner import layer_input
from .places import batch_of, load_factor, load_written


@kernel("T batches ratio")
def written_gradient_kernel(
    k, mask, written, factor, gradient, starts, start_biases, ends, end_biases, dlayer, dv, dk, dwritten, dkept, dfactor,
    T, batches, ratio,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program.

        dK <- dK + sum_s (F_s * G) D_s^T + dA Z_0^T [- ratio dV],   dF_s = <G, K D_s + d_s>,   dphi_sl = <D_s, Z_l> + <d_s, c_l>

    dk: added to what `outputs_gradient` left there, dwritten and dfactor likewise where there is no mask. ratio: curvature / gain,
    with which the derivative by the prediction, which the key is part of, follows from that by v.
    """
    head, token, place = batch_of(T, batches, HV, SIZE)
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    inside = values < DV
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    g = load_rows(gradient + head * DV, token, t, valid, values, HV * DV, DV, BV).to(tl.float32)
    da = load_rows(dlayer + head * DV, token, t, valid, values, HV * DV, DV, BV)
    operand = key.dtype
    x = load_rows(dk + head * DK, token, t, valid, keys, HV * DK, DK, BK).to(tl.float32)
    if RESIDUAL:
        x -= ratio * load_rows(dv + head * DV, token, t, valid, keys, HV * DV, DV, BK).to(tl.float32)
    z = load_block(starts + place * SLOTS * DK * DV, keys, values, DK, DV)
    x = tl.dot(da, tl.trans(z), acc=x, input_precision=PRECISION)
    for s in tl.static_range(SLOTS):
        at = place * SLOTS + s
        d = load_block(ends + at * DK * DV, keys, values, DK, DV)
        c = tl.zeros([BV], tl.float32)
        if BIASED:
            c = tl.load(end_biases + at * DV + values, mask=inside, other=0.0)
        f = load_written(mask, written, factor, at, head, token, t, valid, HV, SIZE)
        felt = tl.sum(g * layer_input(d, c, key, BIASED, PRECISION), 1)
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
        x = tl.dot((f[:, None] * g).to(operand), tl.trans(d), acc=x, input_precision=PRECISION)
        for other in tl.static_range(SLOTS if dkept is not None else 0):
            before = load_block(starts + (place * SLOTS + other) * DK * DV, keys, values, DK, DV)
            total = tl.sum(tl.sum(d.to(tl.float32) * before.to(tl.float32), 1), 0)
            if BIASED:
                total += tl.sum(c * tl.load(start_biases + (place * SLOTS + other) * DV + values, mask=inside, other=0.0), 0)
            tl.store(dkept + at * SLOTS + other, total)
    store_rows(dk + head * DK, token, x, t, valid, keys, HV * DK, DK, BK)
