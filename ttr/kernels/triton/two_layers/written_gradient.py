"""What the writes give back: to k, to F and phi."""

import triton.language as tl

from ..launch import kernel
from ..mini_batch.places import load_factor, load_written
from ..tiles import load_numbers, load_rows, store_rows
from .memory import affine, group_batch_of, load_lower, load_lower_bias, load_upper, load_upper_bias, slot_size


@kernel("T batches heads together begin ratio")
def written_gradient_kernel(
    k, mask, written, factor, starts, hidden, lower, upper, ends, dhidden, dv, dk, dwritten, dkept, dfactor,
    T, batches, heads, together, begin, ratio,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program.

        dK <- dK + sum_s (F_s * L) D_s^T + dA Z_0^T [- ratio dV],        dF_s = <L, K D_s> + <U, X E_s>,
        dphi_sl = <D_s, Z_l> + <E_s, Y_l>                                (their biases with K = X = 1)

    dk: added to what `writers` left there, dwritten and dfactor likewise where there is no mask. ratio: curvature / gain,
    with which the derivative by the prediction, which the key is part of, follows from that by v.
    """
    head, token, place, own = group_batch_of(T, batches, heads, together, begin, HV, SIZE)
    here = own * SIZE
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    wide = slot_size(DK, DV, M, BIASED)
    start, end = starts + own * SLOTS * wide, ends + own * SLOTS * wide
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    u = load_rows(upper, here, t, valid, values, DV, DV, BV).to(tl.float32)
    operand = key.dtype
    dx = load_rows(dk + head * DK, token, t, valid, keys, HV * DK, DK, BK).to(tl.float32)
    if RESIDUAL:
        dx -= ratio * load_rows(dv + head * DV, token, t, valid, keys, HV * DV, DV, BK).to(tl.float32)
    for s in tl.static_range(SLOTS):
        at = place * SLOTS + s
        f = load_written(mask, written, factor, at, head, token, t, valid, HV, SIZE)
        d = load_upper_bias(end + s * wide, values, DK, DV, M, BIASED)
        felt = tl.sum(u * d[None, :], 1)
        kept_own = 0.0
        kept_other = 0.0
        if BIASED and dkept is not None:
            kept_own = tl.sum(d * load_upper_bias(start, values, DK, DV, M, BIASED), 0)
            if SLOTS == 2:
                kept_other = tl.sum(d * load_upper_bias(start + wide, values, DK, DV, M, BIASED), 0)
        for first in tl.range(0, M, BM, disable_licm=True):
            units = first + tl.arange(0, BM)
            x = load_rows(hidden, here, t, valid, units, M, M, BM)
            l = load_rows(lower, here, t, valid, units, M, M, BM).to(tl.float32)
            dz = load_lower(end + s * wide, keys, units, DK, M)
            dy = load_upper(end + s * wide, units, values, DK, DV, M)
            c = load_lower_bias(end + s * wide, units, DK, DV, M, BIASED)
            felt += tl.sum(l * affine(key, dz, c, PRECISION), 1) + tl.sum(u * tl.dot(x, dy, input_precision=PRECISION), 1)
            dx = tl.dot((f[:, None] * l).to(operand), tl.trans(dz), acc=dx, input_precision=PRECISION)
            if s == 0:
                da = load_rows(dhidden, here, t, valid, units, M, M, BM)
                z = load_lower(start, keys, units, DK, M)
                dx = tl.dot(da, tl.trans(z), acc=dx, input_precision=PRECISION)
            if dkept is not None:
                z = load_lower(start, keys, units, DK, M)
                y = load_upper(start, units, values, DK, DV, M)
                kept_own += tl.sum(dz.to(tl.float32) * z.to(tl.float32)) + tl.sum(dy.to(tl.float32) * y.to(tl.float32))
                if BIASED:
                    kept_own += tl.sum(c * load_lower_bias(start, units, DK, DV, M, BIASED), 0)
                if SLOTS == 2:
                    z = load_lower(start + wide, keys, units, DK, M)
                    y = load_upper(start + wide, units, values, DK, DV, M)
                    kept_other += tl.sum(dz.to(tl.float32) * z.to(tl.float32)) + tl.sum(dy.to(tl.float32) * y.to(tl.float32))
                    if BIASED:
                        kept_other += tl.sum(c * load_lower_bias(start + wide, units, DK, DV, M, BIASED), 0)
        if mask is None:
            b = load_numbers(written, head, token, t, valid, HV, 0.0, True)
            _, final = load_factor(factor, head, t, valid, SIZE)
            number = dwritten + (token + t) * HV + head
            tl.store(number, tl.load(number, mask=valid, other=0.0) + felt * final, mask=valid)
            if factor is not None:
                ending = dfactor + place * SIZE + SIZE - 1
                tl.store(ending, tl.load(ending) + tl.sum(tl.where(valid, felt * b, 0.0), 0))
        else:
            tl.store(dwritten + at * SIZE + t, felt, mask=valid)
        if dkept is not None:
            tl.store(dkept + at * SLOTS, kept_own)
            if SLOTS == 2:
                tl.store(dkept + at * SLOTS + 1, kept_other)
    tl.debug_barrier()  # all have read what lay there
    store_rows(dk + head * DK, token, dx, t, valid, keys, HV * DK, DK, BK)
