"""Conjugate gradients for all tokens of a chunk at once."""

import triton.language as tl

from ..launch import kernel
from ..tiles import factor, load_decays, load_numbers, load_rows, locate, pair_decay, product, sequence, states_of, tokens_of
from .scaled import power_below, power_of_rows, scaled_rows, unpacked
from .steps import begun, moved


@kernel("N T blocks scale iterations tolerance weight_stride")
def solve_kernel(
    q, k, states, sizes, decays, weight, ridge, x, other, dridge, cu_seqlens,
    N, T, blocks, scale, iterations, tolerance, weight_stride,
    HQ: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr,
    WEIGHTED: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    RIDGES: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program: (H_t + Lambda) x_t = scale q_t from x = 0, every row a system of its own.

        Y = decay P H_0 + (P K^T * decay w) K + P Lambda      (here times `power`)

    What Y moves: `steps`; the loop ends with the last row.
    states, sizes: of `statistics`. ridge: Lambda, [Hv, dk], with RIDGES [tokens, Hv, dk]. other, dridge: x of another right-hand side and
    -sum_t x_t other_t, [chunks, Hv, dk], or None.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    keys = tl.arange(0, BK)
    place = slot.to(tl.int64) * HV + head
    if chunk * C >= length:
        if dridge is not None:
            tl.store(dridge + place * DK + keys, tl.zeros([BK], tl.float32), mask=keys < DK)
        return
    i = tl.arange(0, C)
    token = first + chunk * C
    valid = chunk * C + i < length
    past = tl.reshape(states_of(states, blocks * HV, DK, DK, BK, BK).load([slot * HV + head, 0, 0]), [BK, BK])
    size = tl.load(sizes + place)
    G, before, _ = load_decays(decays, head, token, i, length - chunk * C, C, HV, GATED)
    read = before if READ_BEFORE else G
    b = load_numbers(weight, head, token, i, valid, weight_stride, 1.0, WEIGHTED)
    key = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK).load([chunk * C, 0])
    rows = power_of_rows(key)
    key = scaled_rows(key, rows, OPERAND)
    written = tl.where(valid, b / (rows * rows), 0.0)
    power = power_below(tl.max(tl.abs(written), 0))
    pairs = pair_decay(read[:, None], G[None, :], i[:, None], i[None, :], READ_BEFORE) * (written * power)[None, :]
    pairs = pairs.to(OPERAND)
    kept = factor(read) * (size * power)

    r = tokens_of(q, first, head // (HV // HQ), length, HQ, DK, C, BK).load([chunk * C, 0]).to(tl.float32) * scale
    solution, now, least, carried = begun(r, tolerance, OPERAND)
    step = 0
    while (step < iterations) & (tl.max(now - least, 0) > 0):
        p = unpacked(carried, OPERAND)
        scores = product(p, tl.trans(key), PRECISION).to(OPERAND) * pairs
        y = tl.dot(scores, key, acc=product(p, past, PRECISION) * kept[:, None], input_precision=PRECISION)
        if RIDGES:
            own = load_rows(ridge + head * DK, token, i, valid, keys, HV * DK, DK, BK)
        else:
            own = tl.load(ridge + head * DK + keys, mask=keys < DK, other=1.0)  # every time: registers are short
        direction = p.to(tl.float32)
        y += direction * (own * power if RIDGES else (own * power)[None, :])
        solution, r, now, carried = moved(solution, r, now, least, direction, y, power, OPERAND)
        step += 1
    tokens_of(x, first, head, length, HV, DK, C, BK).store([chunk * C, 0], solution.to(x.dtype.element_ty))
    if dridge is not None:
        already = tokens_of(other, first, head, length, HV, DK, C, BK).load([chunk * C, 0]).to(tl.float32)
        tl.store(dridge + place * DK + keys, -tl.sum(solution * already, 0), mask=keys < DK)
