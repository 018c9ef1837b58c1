"""The scan over chunks: outputs and the states after the last token.

Tokens are rows, so that a thread holds few of the six numbers of each (of columns it would hold a quarter of a chunk's).
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import product, tokens_of
from .levels import levels_of, load_look, load_read
from .scan import advanced, load_states, place_of, store_states


@kernel("T")
def forward_kernel(
    q, k, v, levels, mixing, inverse, reads, start, o, error, last, cu_seqlens, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head of a sequence.

        U = T (V - sum_s X_s * (K Z_s)), T: `inverse`; without ERASE U = V
        O = sum_s Q_s * (Q Z_s) + reads U,     Z_s <- sum_l phi_sl Z_l + K^T (F_s * U)

    start (or None), last: [N, Hv, 2, dk, dv]. error: U, where backward wants it.
    """
    tile, n, head, first, length, chunks, slot = place_of(cu_seqlens, T, (DV + BV - 1) // BV, HV, C, PACKED)
    queries = tokens_of(q, first, head // (HV // H), length, H, DK, C, BK)
    keys_ = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    values_ = tokens_of(v, first, head, length, HV, DV, C, BV)
    outs = tokens_of(o, first, head, length, HV, DV, C, BV)
    pairs_ = tokens_of(reads, first, head, length, HV, C, C, C)
    if ERASE:
        systems = tokens_of(inverse, first, head, length, HV, C, C, C)
        if error is not None:
            errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    keys = tl.arange(0, BK)
    values = tile * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    z0, z1 = load_states(start, n * HV + head, keys, values, DK, DV, BK, BV)
    for chunk in tl.range(chunks, disable_licm=True):
        here = levels_of(levels, slot + chunk, head, HV, C, LEVELS)
        key = keys_.load([chunk * C, 0])
        e = values_.load([chunk * C, tile * BV])
        operand = key.dtype
        past0 = z0.to(operand)
        past1 = z1.to(operand)
        if ERASE:
            l0, l1 = load_look(here, LEVELS, t, C)
            looked = product(key, past0, PRECISION) * l0[:, None]
            looked += product(key, past1, PRECISION) * l1[:, None]
            e = product(systems.load([chunk * C, 0]), (e.to(tl.float32) - looked).to(operand), PRECISION).to(operand)
            if error is not None:
                errors.store([chunk * C, tile * BV], e)
        r0, r1 = load_read(here, LEVELS, t, C)
        query = queries.load([chunk * C, 0])
        out = product(query, past0, PRECISION) * r0[:, None]
        out += product(query, past1, PRECISION) * r1[:, None]
        out = tl.dot(pairs_.load([chunk * C, 0]), e, acc=out, input_precision=PRECISION)
        outs.store([chunk * C, tile * BV], out.to(operand))
        z0, z1 = advanced(z0, z1, key, e, here, mixing, slot + chunk, head, t, HV, C, LEVELS, PRECISION)
    store_states(last, n * HV + head, z0, z1, keys, values, DK, DV)
