"""What the outputs give back to those whose writes they read: to both layers' gradients, to X, to R, and to k."""

import triton.language as tl

from ..launch import kernel
from ..mini_batch.outputs import scores_of
from ..mini_batch.places import load_factor, load_pairs, pair_pointers
from ..tiles import load_numbers, load_rows, product, store_rows
from .activations import activation_derivatives
from .memory import affine, group_batch_of, load_lower, load_lower_bias, load_upper, slot_size


@kernel("T batches heads together begin")
def writers_kernel(
    q, k, mask, written, factor, starts, hidden, lower, upper, dout, read, dinner, curved, dk, dhidden, dlower, dupper, dmask,
    dwritten, dfactor, T, batches, heads, together, begin,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program; rows are those who wrote, columns those who read.

        S = R^T * (U dC^T):  dX = S B,     dL = (R^T * K Q^T) dA,     dU = (R^T * X B^T) dC,     dK = (R^T * L dA^T) Q
        dR^T = K Q^T * L dA^T + X B^T * U dC^T,                   curved = (U Y_0^T) * a''(A)

    dk: [tokens, Hv, dk]. dhidden, dlower, dupper: dX, dL and dU, as the group's tokens lie. dmask may lie where mask does.
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
    out = load_rows(dout, here, t, valid, values, DV, DV, BV)
    operand = query.dtype
    start = starts + own * SLOTS * slot_size(DK, DV, M, BIASED)
    weights = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE, True)
    scores = scores_of(key, query, BIASED, PRECISION)
    outer = product(u, tl.trans(out), PRECISION)  # <U_j, dC_i>
    given, inner = (weights * outer).to(operand), (weights * scores).to(operand)
    across = tl.zeros([ROWS, ROWS], tl.float32)  # <L_j, dA_i>
    alike = tl.zeros([ROWS, ROWS], tl.float32)  # <X_j, B_i>
    for first in tl.range(0, M, BM, disable_licm=True):
        units = first + tl.arange(0, BM)
        c = load_lower_bias(start, units, DK, DV, M, BIASED)
        _x, _derivative, second = activation_derivatives(affine(key, load_lower(start, keys, units, DK, M), c, PRECISION), ACTIVATION)
        curve = product(u, tl.trans(load_upper(start, units, values, DK, DV, M)), PRECISION) * second
        store_rows(curved, here, curve, t, valid, units, M, M, BM)
        x = load_rows(hidden, here, t, valid, units, M, M, BM)
        l = load_rows(lower, here, t, valid, units, M, M, BM)
        b = load_rows(read, here, t, valid, units, M, M, BM)
        da = load_rows(dinner, here, t, valid, units, M, M, BM)
        across = tl.dot(l, tl.trans(da), acc=across, input_precision=PRECISION)
        alike = tl.dot(x, tl.trans(b), acc=alike, input_precision=PRECISION)
        store_rows(dhidden, here, product(given, b, PRECISION), t, valid, units, M, M, BM)
        store_rows(dlower, here, product(inner, da, PRECISION), t, valid, units, M, M, BM)
    if BIASED:
        alike += 1.0
    store_rows(dupper, here, product((weights * alike).to(operand), out, PRECISION), t, valid, values, DV, DV, BV)
    store_rows(dk + head * DK, token, product((weights * across).to(operand), query, PRECISION), t, valid, keys, HV * DK, DK, BK)
    taken = scores * across + alike * outer
    if mask is None:
        b = load_numbers(written, head, token, t, valid, HV, 0.0, True)
        c, _ = load_factor(factor, head, t, valid, SIZE)
        seen = t[None, :] > t[:, None] if BEFORE else t[None, :] >= t[:, None]
        taken = tl.where(seen, taken, 0.0)
        tl.store(dwritten + (token + t) * HV + head, tl.sum(taken * c[None, :], 1), mask=valid)
        if factor is not None:
            tl.store(dfactor + place * SIZE + t, tl.sum(taken * b[:, None], 0), mask=valid)
    else:
        tl.debug_barrier()  # dmask may be the mask, which all have read by now
        tl.store(pair_pointers(dmask, place, t, SIZE, True), taken, mask=valid[:, None] & valid[None, :])
