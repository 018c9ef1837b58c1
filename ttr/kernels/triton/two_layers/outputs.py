"""The reads of a group's mini-batches at once."""

import triton
import triton.language as tl

from ..launch import kernel
from ..mini_batch.inner import normalized
from ..mini_batch.outputs import scores_of
from ..mini_batch.places import load_affine, load_pairs, load_rows_of
from ..tiles import load_rows, product, store_rows
from .activations import activation_derivatives
from .memory import affine, group_batch_of, load_lower, load_lower_bias, load_upper, load_upper_bias, slot_size


@triton.jit
def read_lower(
    query, pairs, l, start, rows, place, t, valid, keys, units,
    DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries find before the activation. pairs: R * Q K^T."""
    wide = slot_size(DK, DV, M, BIASED)
    a = product(pairs, l, PRECISION)
    for s in tl.static_range(SLOTS):
        z = load_lower(start + s * wide, keys, units, DK, M)
        own = affine(query, z, load_lower_bias(start + s * wide, units, DK, DV, M, BIASED), PRECISION)
        a += load_rows_of(rows, place * SLOTS + s, t, valid, SIZE)[:, None] * own
    return a


@triton.jit
def reads_of(
    query, score_pairs, weights, u, hidden, lower, read, slopes, start, rows, place, here, head, t, valid, keys, values,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries find, before the norm. score_pairs: R * Q K^T; weights: R. read, slopes: to keep B and a'(A), or None."""
    out = tl.zeros([ROWS, BV], tl.float32)
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    wide = slot_size(DK, DV, M, BIASED)
    for first in tl.range(0, M, BM, disable_licm=True):
        units = first + tl.arange(0, BM)
        x = load_rows(hidden, here, t, valid, units, M, M, BM)
        l = load_rows(lower, here, t, valid, units, M, M, BM)
        a = read_lower(query, score_pairs, l, start, rows, place, t, valid, keys, units, DK, DV, M, SIZE, SLOTS, BIASED, PRECISION)
        b, slope, _curvature = activation_derivatives(a, ACTIVATION)
        b = b.to(query.dtype)
        if read is not None:
            store_rows(read, here, b, t, valid, units, M, M, BM)
            store_rows(slopes, here, slope, t, valid, units, M, M, BM)
        for s in tl.static_range(SLOTS):
            row = load_rows_of(rows, place * SLOTS + s, t, valid, SIZE)
            out += row[:, None] * product(b, load_upper(start + s * wide, units, values, DK, DV, M), PRECISION)
        scores = tl.dot(b, tl.trans(x), acc=scores, input_precision=PRECISION)
    if BIASED:  # a weight whose input is 1
        scores += 1.0
        for s in tl.static_range(SLOTS):
            d = load_upper_bias(start + s * wide, values, DK, DV, M, BIASED)
            out += load_rows_of(rows, place * SLOTS + s, t, valid, SIZE)[:, None] * d[None, :]
    return tl.dot((weights * scores).to(query.dtype), u, acc=out, input_precision=PRECISION)


@kernel("T batches heads together begin eps")
def outputs_kernel(
    q, k, mask, rows, written, factor, gamma, beta, starts, hidden, lower, upper, o, T, batches, heads, together, begin, eps,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program."""
    head, token, place, own = group_batch_of(T, batches, heads, together, begin, HV, SIZE)
    here = own * SIZE
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    u = load_rows(upper, here, t, valid, values, DV, DV, BV)
    weights = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE)
    pairs = (weights * scores_of(query, key, BIASED, PRECISION)).to(query.dtype)
    start = starts + own * SLOTS * slot_size(DK, DV, M, BIASED)
    y = reads_of(
        query, pairs, weights, u, hidden, lower, None, None, start, rows, place, here, head, t, valid, keys, values,
        HV, DK, DV, M, BV, BM, SIZE, ROWS, SLOTS, BIASED, ACTIVATION, PRECISION,
    )  # fmt: skip
    if NORM:
        scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
        normal, _ = normalized(y, values, eps, DV, BV, NORM)
        y = normal * scale[None, :] + shift[None, :]
    if RESIDUAL:
        y += query.to(tl.float32)
    store_rows(o + head * DV, token, y, t, valid, values, HV * DV, DV, BV)
