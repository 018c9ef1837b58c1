"""The scan over mini-batches: where each begins, and its gradients."""

import triton.language as tl

from ..launch import kernel
from ..mini_batch.inner import loss_gradient, normalized, slope
from ..mini_batch.places import load_affine, place_of
from ..tiles import load_rows, product, store_rows
from .activations import activation_derivatives
from .exchange import scan_place_of, summed
from .memory import affine, load_both_slots, load_both_written, mixed, slot_size, store_both_slots


@kernel("T batches heads begin count memories eps curvature gain")
def advance_kernel(
    k, v, mask, written, kept, factor, gamma, beta, first, last, starts, hidden, slopes, predicted, lower, upper, partial, arrived,
    T, batches, heads, begin, count, memories, eps, curvature, gain,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`count` mini-batches, from `begin` on; PARTS programs a head, the hidden units shared among them.

    first, last: the memory before and behind them, [N, Hv, r, slot], float32; last None where nobody wants it. memories: the heads
    that first has, Hv where all sequences begin alike. starts: the memory before every mini-batch of the group's heads, rounded as
    products take it, [count, heads, r, slot]. hidden, slopes, lower: X, a'(A) and L, upper: U, and what U is the gradient at
    (predicted, float32): [count, heads, b, m or dv].
    """
    local, together, part, n, head = scan_place_of(heads, HV, PARTS)
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    units = part * BM + tl.arange(0, BM)
    valid = t < SIZE
    wide = slot_size(DK, DV, M, BIASED)
    began = ((heads + local) % memories).to(tl.int64) * SLOTS * wide
    z, y, c, d, n_z, n_y, n_c, n_d = load_both_slots(first + began, keys, units, values, DK, DV, M, BIASED, SLOTS)
    for step in tl.range(0, count, disable_licm=True):
        batch = begin + step
        token = n.to(tl.int64) * T + batch * SIZE
        place = place_of(n, batch, batches, head, HV)
        own = local.to(tl.int64) + step * together
        here = own * SIZE  # among the group's tokens
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        operand = key.dtype
        start = starts + own * SLOTS * wide
        store_both_slots(start, z, y, c, d, n_z, n_y, n_c, n_d, keys, units, values, DK, DV, M, BIASED, SLOTS)
        x, derivative, _second = activation_derivatives(affine(key, z, c, PRECISION), ACTIVATION)
        x = x.to(operand)
        store_rows(hidden, here, x, t, valid, units, M, M, BM)
        store_rows(slopes, here, derivative, t, valid, units, M, M, BM)
        a = product(x, y.to(operand), PRECISION)
        a = summed(a, partial, arrived, step, part, local, t, values, ROWS, BV, PARTS) + d.to(operand).to(tl.float32)[None, :]
        value = load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV)
        scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
        normal, rate = normalized(a, values, eps, DV, BV, NORM)
        e = slope(normal, key, value, scale, shift, curvature, gain, NORM, RESIDUAL)
        u = loss_gradient(e, normal, rate, scale, values, DV, BV, NORM)[0].to(operand)
        if part == 0:
            store_rows(predicted, here, a, t, valid, values, DV, DV, BV)
            store_rows(upper, here, u, t, valid, values, DV, DV, BV)
        f, n_f = load_both_written(mask, written, factor, place, head, token, t, valid, HV, SIZE, SLOTS)
        l = (product(u, tl.trans(y.to(operand)), PRECISION) * derivative).to(operand)
        store_rows(lower, here, l, t, valid, units, M, M, BM)
        x = load_rows(hidden, here, t, valid, units, M, M, BM)  # Triton 3.6 miscompiles a product's transpose as an operand
        l = l.to(tl.float32)
        write = f[:, None] * u.to(tl.float32)
        z, n_z = mixed(kept, place, z, n_z, SLOTS)
        y, n_y = mixed(kept, place, y, n_y, SLOTS)
        z = tl.dot(tl.trans(key), (f[:, None] * l).to(operand), acc=z, input_precision=PRECISION)
        y = tl.dot(tl.trans(x), write.to(operand), acc=y, input_precision=PRECISION)
        if BIASED:
            c, n_c = mixed(kept, place, c, n_c, SLOTS)
            d, n_d = mixed(kept, place, d, n_d, SLOTS)
            c += tl.sum(f[:, None] * l, 0)
            d += tl.sum(write, 0)
        if SLOTS == 2:
            write = n_f[:, None] * u.to(tl.float32)
            n_z = tl.dot(tl.trans(key), (n_f[:, None] * l).to(operand), acc=n_z, input_precision=PRECISION)
            n_y = tl.dot(tl.trans(x), write.to(operand), acc=n_y, input_precision=PRECISION)
            if BIASED:
                n_c += tl.sum(n_f[:, None] * l, 0)
                n_d += tl.sum(write, 0)
    if last is not None:
        row = (heads + local).to(tl.int64) * SLOTS * wide
        store_both_slots(last + row, z, y, c, d, n_z, n_y, n_c, n_d, keys, units, values, DK, DV, M, BIASED, SLOTS)
