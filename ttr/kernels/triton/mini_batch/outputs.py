"""The reads of all mini-batches at once."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import load_block, load_rows, product, store_rows
from .inner import normalized
from .places import batch_of, load_affine, load_pairs, load_rows_of


@triton.jit
def read_slot(query, z, bias, row, place, slot, t, valid, keys, values, DK: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr,
              SLOTS: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Q Z_s + c_s and Q0_s, which weighs it."""
    at = place * SLOTS + slot
    y = product(query, load_block(z + at * DK * DV, keys, values, DK, DV), PRECISION)
    if BIASED:
        y += tl.load(bias + at * DV + values, mask=values < DV, other=0.0)[None, :]
    return y, load_rows_of(row, at, t, valid, SIZE)


@triton.jit
def scores_of(query, key, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """Q K^T; a bias is a weight whose input is 1."""
    scores = product(query, tl.trans(key), PRECISION)
    if BIASED:
        scores += 1.0
    return scores


@kernel("T batches eps")
def outputs_kernel(
    q, k, gradient, mask, rows, written, factor, gamma, beta, starts, start_biases, o, T, batches, eps,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """One mini-batch of one head a program: Y = sum_s Q0_s * (Q Z_s) + (R * Q K^T) G,  O = [Q +] [LN](Y). mask, rows: R, Q0."""
    head, token, place = batch_of(T, batches, HV, SIZE)
    t = tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    values = tl.arange(0, BV)
    valid = t < SIZE
    query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
    g = load_rows(gradient + head * DV, token, t, valid, values, HV * DV, DV, BV)
    pairs = load_pairs(mask, written, factor, place, head, token, t, valid, HV, SIZE, BEFORE)
    pairs *= scores_of(query, key, BIASED, PRECISION)
    y = product(pairs.to(query.dtype), g, PRECISION)
    for slot in tl.static_range(SLOTS):
        own, row = read_slot(
            query, starts, start_biases, rows, place, slot, t, valid, keys, values, DK, DV, SIZE, SLOTS, BIASED, PRECISION
        )  # fmt: skip
        y += row[:, None] * own
    if NORM:
        scale, shift = load_affine(gamma, beta, head, values, DV, NORM)
        normal, _ = normalized(y, values, eps, DV, BV, NORM)
        y = normal * scale[None, :] + shift[None, :]
    if RESIDUAL:
        y += query.to(tl.float32)
    store_rows(o + head * DV, token, y, t, valid, values, HV * DV, DV, BV)
