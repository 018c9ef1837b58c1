"""The scan from the last chunk to the first: the gradients of v and of the first states.

D_s is the gradient of state s behind a chunk, Y that of U:

    Y = sum_s F_s * (K D_s) + reads^T dO,   dV = T^T Y,   D_l <- sum_s phi_sl D_s + (Q_l * Q)^T dO - (X_l * K)^T dV
"""

import triton.language as tl

from ..launch import kernel
from ..mini_batch.places import store_block
from ..tiles import product, tokens_of
from .levels import levels_of, load_column, load_look, load_mixing, load_read
from .scan import load_states, place_of, store_states


@kernel("T")
def reverse_kernel(
    q, k, levels, mixing, inverse, reads, do, last_gradient, dv, ends, first_gradient, cu_seqlens, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head of a sequence. ends: D behind every chunk, [chunks, Hv, 2, dk, dv].

    last_gradient, first_gradient: [N, Hv, 2, dk, dv] or None.
    """
    tile, n, head, first, length, chunks, slot = place_of(cu_seqlens, T, (DV + BV - 1) // BV, HV, C, PACKED)
    queries = tokens_of(q, first, head // (HV // H), length, H, DK, C, BK)
    keys_ = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    outs = tokens_of(do, first, head, length, HV, DV, C, BV)
    dvs = tokens_of(dv, first, head, length, HV, DV, C, BV)
    pairs_ = tokens_of(reads, first, head, length, HV, C, C, C)
    if ERASE:
        systems = tokens_of(inverse, first, head, length, HV, C, C, C)
    keys = tl.arange(0, BK)
    values = tile * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    d0, d1 = load_states(last_gradient, n * HV + head, keys, values, DK, DV, BK, BV)
    for step in tl.range(chunks, disable_licm=True):
        chunk = chunks - 1 - step
        here = levels_of(levels, slot + chunk, head, HV, C, LEVELS)
        key = keys_.load([chunk * C, 0])
        operand = key.dtype
        f0, f1 = load_column(here, LEVELS, t, C)
        future = d0.to(operand)
        at = ends + ((slot + chunk).to(tl.int64) * HV + head) * 2 * DK * DV
        store_block(at, future, keys, values, DK, DV)
        y = product(key, future, PRECISION) * f0[:, None]
        future = d1.to(operand)
        store_block(at + DK * DV, future, keys, values, DK, DV)
        y += product(key, future, PRECISION) * f1[:, None]
        out = outs.load([chunk * C, tile * BV])
        y = tl.dot(tl.trans(pairs_.load([chunk * C, 0])), out, acc=y, input_precision=PRECISION)
        m00, m01, m10, m11 = load_mixing(mixing, slot + chunk, head, HV)
        d0, d1 = m00 * d0 + m10 * d1, m01 * d0 + m11 * d1
        query = queries.load([chunk * C, 0])
        r0, r1 = load_read(here, LEVELS, t, C)
        out = out.to(tl.float32)
        d0 = tl.dot(tl.trans(query), (out * r0[:, None]).to(operand), acc=d0, input_precision=PRECISION)
        d1 = tl.dot(tl.trans(query), (out * r1[:, None]).to(operand), acc=d1, input_precision=PRECISION)
        if ERASE:
            l0, l1 = load_look(here, LEVELS, t, C)
            y = product(tl.trans(systems.load([chunk * C, 0])), y.to(operand), PRECISION)
            d0 = tl.dot(tl.trans(key), (y * -l0[:, None]).to(operand), acc=d0, input_precision=PRECISION)
            d1 = tl.dot(tl.trans(key), (y * -l1[:, None]).to(operand), acc=d1, input_precision=PRECISION)
        dvs.store([chunk * C, tile * BV], y.to(operand))
    if first_gradient is not None:
        store_states(first_gradient, n * HV + head, d0, d1, keys, values, DK, DV)
