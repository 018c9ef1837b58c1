"""Conjugate gradients for all tokens of a far chunk at once: its pairs meet in rounds."""

import triton
import triton.language as tl

from ..launch import kernel
from ..least_squares.scaled import power_below, unpacked
from ..least_squares.steps import begun, moved
from ..tiles import NAN_STAYS, load_numbers, load_rows, locate, product, sequence, states_of, tokens_of
from ..vector_gate.decays import power as two_to
from ..vector_gate.rounds import meeting_place, met


@triton.jit
def bounded(exponent, MOST: tl.constexpr):
    """2^exponent in float32; what is cut off belongs to no pair of the round."""
    return tl.exp2(tl.minimum(exponent.to(tl.float32), MOST + 1.0, NAN_STAYS))


@kernel("N T blocks scale iterations tolerance")
def solve_far_kernel(
    q, keys, written, sums, states, sizes, far, ridge, x, other, dridge, cu_seqlens, N, T, blocks, scale, iterations, tolerance,
    HQ: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, REACH: tl.constexpr, ROUNDS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    RIDGES: tl.constexpr,
):  # fmt: skip
    """As `solve_near_kernel`. With h the sums, before the token where it reads before, and `at` those where a round's pairs meet and
    half of REACH, as in `prepare`:

        Y = 2^h * ((P 2^h) H_0) + sum_rounds U * (((P * U) B^T * written) B) + P Lambda,      U = 2^(h - at),  B = K 2^(at - h)

    The rounds are those of `vector_gate.rounds` but for the first, the last `far` of them, with all pairs of its blocks: they
    meet in the blocks' middles, where no channel has strayed further than 2^REACH.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    place = slot.to(tl.int64) * HV + head
    if chunk * C >= length:
        return
    rounds = tl.load(far + place)
    if rounds == 0:
        return
    BEFORE: tl.constexpr = 1 if READ_BEFORE else 0  # tokens
    begin = ROUNDS - rounds
    i = tl.arange(0, C)
    channels = tl.arange(0, BK)
    token = first + chunk * C
    count = length - chunk * C
    valid = i < count
    sums += head * DK
    past = tl.reshape(states_of(states, blocks * HV, DK, DK, BK, BK).load([slot * HV + head, 0, 0]), [BK, BK])
    b = load_numbers(written, head, token, i, valid, HV, 0.0, True)
    power = power_below(tl.max(tl.abs(b), 0))
    b *= power
    kept = power * tl.load(sizes + place)
    seen = i[:, None] > i[None, :] if READ_BEFORE else i[:, None] >= i[None, :]
    keys_ = tokens_of(keys, first, head, length, HV, DK, C, BK)

    r = tokens_of(q, first, head // (HV // HQ), length, HQ, DK, C, BK).load([chunk * C, 0]).to(tl.float32) * scale
    solution, now, least, carried = begun(r, tolerance, OPERAND)
    step = 0
    while (step < iterations) & (tl.max(now - least, 0) > 0):
        direction = unpacked(carried, OPERAND).to(tl.float32)
        up = two_to(load_rows(sums, token, i - BEFORE, valid & (i >= BEFORE), channels, HV * DK, DK, BK))
        y = product((direction * up).to(OPERAND), past, PRECISION) * (up * kept)
        for round in tl.range(begin, ROUNDS, disable_licm=True):
            row = tl.minimum(meeting_place(round, i), count - 1)  # behind the last token nothing decays
            at = load_rows(sums, token, row, valid, channels, HV * DK, DK, BK) + REACH / 2
            h = load_rows(sums, token, i, valid, channels, HV * DK, DK, BK)
            column = (keys_.load([chunk * C, 0]).to(tl.float32) * bounded(at - h, 1.5 * REACH)).to(OPERAND)
            h = load_rows(sums, token, i - BEFORE, valid & (i >= BEFORE), channels, HV * DK, DK, BK)
            up = bounded(h - at, 0.5 * REACH)
            scores = product((direction * up).to(OPERAND), tl.trans(column), PRECISION)
            together = (i[:, None] ^ i[None, :]) < 1 << round
            here = seen & together & ((round == begin) | met(round, i[:, None], i[None, :]))
            scores = tl.where(here, scores * b[None, :], 0.0).to(OPERAND)
            y += product(scores, column, PRECISION) * up
        if RIDGES:
            y += direction * load_rows(ridge + head * DK, token, i, valid, channels, HV * DK, DK, BK) * power
        else:
            own = tl.load(ridge + head * DK + channels, mask=channels < DK, other=1.0)
            y += direction * (own * power)[None, :]
        solution, r, now, carried = moved(solution, r, now, least, direction, y, power, OPERAND)
        step += 1
    tokens_of(x, first, head, length, HV, DK, C, BK).store([chunk * C, 0], solution.to(x.dtype.element_ty))
    if dridge is not None:
        already = tokens_of(other, first, head, length, HV, DK, C, BK).load([chunk * C, 0]).to(tl.float32)
        tl.store(dridge + place * DK + channels, -tl.sum(solution * already, 0), mask=channels < DK)
