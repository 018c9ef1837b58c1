"""What the outputs give back to their readers: to q, to Q0, and at both layers, where the writers find it."""

import triton.language as tl

from ..launch import kernel
from ..mini_batch.inner import normalized, normalized_gradient
from ..mini_batch.outputs import scores_of
from ..mini_batch.places import load_affine, load_pairs, load_rows_of
from ..tiles import load_rows, product, store_rows
from .memory import group_batch_of, load_lower, load_lower_bias, load_upper, load_upper_bias, slot_size
from .outputs import reads_of


@kernel("T batches heads together begin eps")
def readers_kernel(
    q, k, mask, rows, written, factor, gamma, beta, starts, hidden, lower, upper, do, dout, read, dinner, dq, drows, dgamma, dbeta,
    T, batches, heads, together, begin, eps,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program; what the queries find at the lower layer, A, and B = a(A) are made again.

        dC: of what they find at the upper one,   dB = sum_s (Q0_s * dC) Y_s^T + (R * dC U^T) X,    dA = dB * a'(A)
        dQ = sum_s (Q0_s * dA) Z_s^T + (R * dA L^T) K [+ dO],        dQ0_s = <dA, Q Z_s + c_s> + <dC, B Y_s + d_s>

    dout, read, dinner: dC, B and dA, as `upper` and `hidden` lie. dq: [tokens, Hv, dk]; dgamma, dbeta: of this mini-batch
    alone, [N, batches, Hv, dv].
    """
    head, token, place, own = group_batch_of(T, batches, heads, together, begin, HV, SIZE)
    here = own * SIZE
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    u = load_rows(upper, here, t, valid, values, DV, DV, BV)
    operand = query.dtype
    wide = slot_size(DK, DV, M, BIASED)
    start = starts + own * SLOTS * wide
    weights = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE)
    pairs = (weights * scores_of(query, key, BIASED, PRECISION)).to(operand)
    found = reads_of(
        query, pairs, weights, u, hidden, lower, read, dinner, start, rows, place, here, head, t, valid, keys, values,
        HV, DK, DV, M, BV, BM, SIZE, ROWS, SLOTS, BIASED, ACTIVATION, PRECISION,
    )  # fmt: skip
    out = load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV).to(tl.float32)
    given = out
    if NORM:
        scale, _shift = load_affine(gamma, beta, head, values, DV, NORM)
        normal, rate = normalized(found, values, eps, DV, BV, NORM)
        given = normalized_gradient(out * scale[None, :], normal, rate, values, DV, BV, NORM)
        tl.store(dgamma + place * DV + values, tl.sum(out * normal, 0), mask=values < DV)
        tl.store(dbeta + place * DV + values, tl.sum(out, 0), mask=values < DV)
    narrow = given.to(operand)
    store_rows(dout, here, narrow, t, valid, values, DV, DV, BV)
    upper_pairs = (weights * product(narrow, tl.trans(u), PRECISION)).to(operand)
    dx = tl.zeros([ROWS, BK], tl.float32)
    across = tl.zeros([ROWS, ROWS], tl.float32)  # <dA_i, L_j>
    drow = tl.zeros([ROWS], tl.float32)
    n_drow = tl.zeros([ROWS], tl.float32)
    if BIASED:
        drow = tl.sum(given * load_upper_bias(start, values, DK, DV, M, BIASED)[None, :], 1)
        if SLOTS == 2:
            n_drow = tl.sum(given * load_upper_bias(start + wide, values, DK, DV, M, BIASED)[None, :], 1)
    tl.debug_barrier()  # what one thread wrote, the others read
    for first in tl.range(0, M, BM, disable_licm=True):
        units = first + tl.arange(0, BM)
        x = load_rows(hidden, here, t, valid, units, M, M, BM)
        l = load_rows(lower, here, t, valid, units, M, M, BM)
        b = load_rows(read, here, t, valid, units, M, M, BM).to(tl.float32)
        slope = load_rows(dinner, here, t, valid, units, M, M, BM).to(tl.float32)
        db = product(upper_pairs, x, PRECISION)
        for s in tl.static_range(SLOTS):
            y = load_upper(start + s * wide, units, values, DK, DV, M)
            given = product(narrow, tl.trans(y), PRECISION)
            db += load_rows_of(rows, place * SLOTS + s, t, valid, SIZE)[:, None] * given
            if s == 0:
                drow += tl.sum(given * b, 1)
            else:
                n_drow += tl.sum(given * b, 1)
        da = db * slope
        inner = da.to(operand)
        tl.debug_barrier()  # all have read the slopes, which lay here
        store_rows(dinner, here, inner, t, valid, units, M, M, BM)
        across = tl.dot(inner, tl.trans(l), acc=across, input_precision=PRECISION)
        for s in tl.static_range(SLOTS):
            z = load_lower(start + s * wide, keys, units, DK, M)
            given = product(inner, tl.trans(z), PRECISION)
            dx += load_rows_of(rows, place * SLOTS + s, t, valid, SIZE)[:, None] * given
            felt = tl.sum(given * query.to(tl.float32), 1)
            if BIASED:
                felt += tl.sum(da * load_lower_bias(start + s * wide, units, DK, DV, M, BIASED)[None, :], 1)
            if s == 0:
                drow += felt
            else:
                n_drow += felt
    weights = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE)
    dx = tl.dot((weights * across).to(operand), key, acc=dx, input_precision=PRECISION)
    if RESIDUAL:
        dx += load_rows(do + head * DV, token, t, valid, keys, HV * DV, DV, BK).to(tl.float32)
    store_rows(dq + head * DK, token, dx, t, valid, keys, HV * DK, DK, BK)
    if drows is not None:
        tl.store(drows + place * SLOTS * SIZE + t, drow, mask=valid)
        if SLOTS == 2:
            tl.store(drows + (place * SLOTS + 1) * SIZE + t, n_drow, mask=valid)
