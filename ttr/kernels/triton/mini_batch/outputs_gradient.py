"""What the outputs give back: to q, to the mini-batch's gradients, to R and Q0, and to k as it is read. What `retreat` need not make."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_block, load_numbers, load_rows, product, store_rows
from .inner import normalized, normalized_gradient
from .outputs import read_slot, scores_of
from .places import batch_of, load_affine, load_factor, load_pairs, pair_pointers


@kernel("T batches eps")
def outputs_gradient_kernel(
    q, k, gradient, mask, rows, written, factor, gamma, beta, starts, start_biases, do, dy, dq, dk, dgradient, dmask, drows, dwritten,
    dfactor, dgamma, dbeta, normals, rates, T, batches, eps,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program; Y and Q K^T are made again.

        dG = (R * Q K^T)^T dY,   dS = R * dY G^T,   dQ = sum_s (Q0_s * dY) Z_s^T + dS K [+ dO],   dK = dS^T Q
        dR = Q K^T * dY G^T,     dQ0_s = <dY, Q Z_s>

    dq, dk: [tokens, Hv, dk]; dgamma, dbeta: of this mini-batch alone, [N, batches + 1, Hv, dv]. normals, rates: `normalized` of the
    layer's output where the gradients were taken, K Z_0, float32, [tokens, Hv, dv] and, with NORM, [tokens, Hv].
    """
    head, token, place = batch_of(T, batches, HV, SIZE)
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    g = load_rows(gradient + head * DV, token, t, valid, values, HV * DV, DV, BV)
    out = load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV).to(tl.float32)
    operand = query.dtype
    weights = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE)
    scores = scores_of(query, key, BIASED, PRECISION)
    given = out
    if NORM:
        y = product((weights * scores).to(operand), g, PRECISION)
        for slot in tl.static_range(SLOTS):
            own, row = read_slot(
                query, starts, start_biases, rows, place, slot, t, valid, keys, values, DK, DV, SIZE, SLOTS, BIASED, PRECISION
            )  # fmt: skip
            y += row[:, None] * own
        scale, _ = load_affine(gamma, beta, head, values, DV, NORM)
        normal, rate = normalized(y, values, eps, DV, BV, NORM)
        given = normalized_gradient(out * scale[None, :], normal, rate, values, DV, BV, NORM)
        at = (place + tl.program_id(0) // batches * HV) * DV + values
        tl.store(dgamma + at, tl.sum(out * normal, 0), mask=values < DV)
        tl.store(dbeta + at, tl.sum(out, 0), mask=values < DV)
    store_rows(dy + head * DV, token, given, t, valid, values, HV * DV, DV, BV)
    y, _ = read_slot(key, starts, start_biases, None, place, 0, t, valid, keys, values, DK, DV, SIZE, SLOTS, BIASED, PRECISION)
    normal, rate = normalized(y, values, eps, DV, BV, NORM)
    store_rows(normals + head * DV, token, normal, t, valid, values, HV * DV, DV, BV)
    if NORM:
        tl.store(rates + (token + t)[:, None] * HV + head, rate, mask=valid[:, None])
    narrow = given.to(operand)
    own = product(narrow, tl.trans(g), PRECISION)  # <dY_i, G_j>
    if mask is None:
        b = load_numbers(written, head, token, t, valid, HV, 0.0, True)
        c, _ = load_factor(factor, head, t, valid, SIZE)
        seen = t[:, None] > t[None, :] if BEFORE else t[:, None] >= t[None, :]
        given_pairs = tl.where(seen, scores * own, 0.0)
        tl.store(dwritten + (token + t) * HV + head, tl.sum(given_pairs * c[:, None], 0), mask=valid)
        if factor is not None:
            tl.store(dfactor + place * SIZE + t, tl.sum(given_pairs * b[None, :], 1), mask=valid)
    else:
        tl.store(pair_pointers(dmask, place, t, SIZE), scores * own, mask=valid[:, None] & valid[None, :])
    x = product((weights * own).to(operand), key, PRECISION)
    for slot in tl.static_range(SLOTS):
        read, row = read_slot(
            query, starts, start_biases, rows, place, slot, t, valid, keys, values, DK, DV, SIZE, SLOTS, BIASED, PRECISION
        )  # fmt: skip
        if drows is not None:
            tl.store(drows + (place * SLOTS + slot) * SIZE + t, tl.sum(given * read, 1), mask=valid)
        z = load_block(starts + (place * SLOTS + slot) * DK * DV, keys, values, DK, DV)
        x = tl.dot((row[:, None] * given).to(operand), tl.trans(z), acc=x, input_precision=PRECISION)
    if RESIDUAL:
        x += out
    store_rows(dq + head * DK, token, x, t, valid, keys, HV * DK, DK, BK)
    # row: who wrote, column: who reads. Made anew: Triton 3.6 miscompiles a product's transpose as an operand
    weights = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE, True)
    scores = scores_of(key, query, BIASED, PRECISION)
    own = product(g, tl.trans(narrow), PRECISION)
    x = product((weights * own).to(operand), query, PRECISION)
    store_rows(dk + head * DK, token, x, t, valid, keys, HV * DK, DK, BK)
    dg = product((weights * scores).to(operand), narrow, PRECISION)
    store_rows(dgradient + head * DV, token, dg, t, valid, values, HV * DV, DV, BV)
