"""Conjugate gradients for all tokens of a near chunk at once: of no gate, but for a factor a token and channel."""

import triton.language as tl

from ..launch import kernel
from ..least_squares.scaled import power_below, unpacked
from ..least_squares.steps import begun, moved
from ..tiles import load_numbers, load_rows, locate, product, sequence, states_of, tokens_of


@kernel("N T blocks scale iterations tolerance")
def solve_near_kernel(
    q, keys, written, lookers, states, sizes, far, ridge, x, other, dridge, cu_seqlens, N, T, blocks, scale, iterations, tolerance,
    HQ: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    RIDGES: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program: (H_t + Lambda) x_t = scale q_t from x = 0 (`steps`), with U the lookers and

        Y = U * ((P * U) H_0 + ((P * U) K^T * written) K) + P Lambda      (here times `power`)

    keys, written, lookers, far: of `prepare`. states, sizes: of `statistics`. ridge: Lambda, [Hv, dk], with RIDGES [tokens, Hv, dk].
    other, dridge: x of another right-hand side and -sum_t x_t other_t, [chunks, Hv, dk], or None.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    channels = tl.arange(0, BK)
    place = slot.to(tl.int64) * HV + head
    if chunk * C >= length:
        if dridge is not None:
            tl.store(dridge + place * DK + channels, tl.zeros([BK], tl.float32), mask=channels < DK)
        return
    if tl.load(far + place) > 0:
        return
    i = tl.arange(0, C)
    past = tl.reshape(states_of(states, blocks * HV, DK, DK, BK, BK).load([slot * HV + head, 0, 0]), [BK, BK])
    key = tokens_of(keys, first, head, length, HV, DK, C, BK).load([chunk * C, 0])
    b = load_numbers(written, head, first + chunk * C, i, chunk * C + i < length, HV, 0.0, True)
    power = power_below(tl.max(tl.abs(b), 0))
    b *= power
    kept = power * tl.load(sizes + place)
    seen = i[:, None] > i[None, :] if READ_BEFORE else i[:, None] >= i[None, :]
    factors = tokens_of(lookers, first, head, length, HV, DK, C, BK)

    r = tokens_of(q, first, head // (HV // HQ), length, HQ, DK, C, BK).load([chunk * C, 0]).to(tl.float32) * scale
    solution, now, least, carried = begun(r, tolerance, OPERAND)
    step = 0
    while (step < iterations) & (tl.max(now - least, 0) > 0):
        p = unpacked(carried, OPERAND)
        factor = factors.load([chunk * C, 0])  # every time, as below: registers are short
        looked = p * factor
        scores = tl.where(seen, product(looked, tl.trans(key), PRECISION), 0.0)  # what is not seen may be past fp16
        y = tl.dot((scores * b[None, :]).to(OPERAND), key, acc=product(looked, past, PRECISION) * kept, input_precision=PRECISION)
        if RIDGES:
            own = load_rows(ridge + head * DK, first + chunk * C, i, chunk * C + i < length, channels, HV * DK, DK, BK)
        else:
            own = tl.load(ridge + head * DK + channels, mask=channels < DK, other=1.0)
        direction = p.to(tl.float32)
        y = y * factor.to(tl.float32) + direction * (own * power if RIDGES else (own * power)[None, :])
        solution, r, now, carried = moved(solution, r, now, least, direction, y, power, OPERAND)
        step += 1
    tokens_of(x, first, head, length, HV, DK, C, BK).store([chunk * C, 0], solution.to(x.dtype.element_ty))
    if dridge is not None:
        already = tokens_of(other, first, head, length, HV, DK, C, BK).load([chunk * C, 0]).to(tl.float32)
        tl.store(dridge + place * DK + channels, -tl.sum(solution * already, 0), mask=channels < DK)
