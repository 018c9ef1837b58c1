"""Device functions: the pairs of a far chunk (`decays`), round by round.

The first round takes every token with itself. Round r has the pairs that lie in one block of 2^r tokens, in different halves of
it, and they meet between the halves.
"""

import triton
import triton.language as tl

from ..tiles import NAN_STAYS, product
from .decays import added_up

ITEMS = tl.constexpr(8)  # chunks that one program looks at for far ones


@triton.jit
def meeting_place(round, t):
    """The token after which the pairs of a round meet, of the block that token t is in."""
    size = 1 << round
    return tl.where(round == 0, t, (t & -size) + (size >> 1) - 1)


@triton.jit
def meeting(G, round, t, WIDE: tl.constexpr):
    """About what is summed up to where the pairs of a round meet, as G. What a row is multiplied by for it, the column is divided by."""
    row = meeting_place(round, t)
    if WIDE:
        return tl.gather(G, tl.broadcast_to(row[:, None], G.shape), 0)
    else:
        return added_up(t[None, :] == row[:, None], G, tl.float16)


@triton.jit
def bounded(exponent):
    """2^exponent in float32; what is cut off belongs to no pair of the round."""
    return tl.exp2(tl.minimum(exponent.to(tl.float32), 1.0, NAN_STAYS))


@triton.jit
def met(round, i, j):
    """Whether the tokens i and j meet in this round: in one block of 2^r tokens, in different halves of it."""
    apart = i ^ j
    return (apart >= (1 << round) >> 1) & (apart < 1 << round)


@triton.jit
def decayed_pairs(
    pairs, rows, columns, later, G, t,
    operand: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pairs, [C, C], plus sum_k rows_ik columns_jk 2^(later_ik - G_jk) for i >= j; for i < j anything finite."""
    for round in tl.range(0, ROUNDS, disable_licm=True):
        at = meeting(G, round, t, WIDE)
        a = (rows * bounded(later - at)).to(operand)
        b = tl.trans((columns * bounded(at - G)).to(operand))
        pairs += tl.where(met(round, t[:, None], t[None, :]), product(a, b, PRECISION), 0.0)
    return pairs


@triton.jit
def load_pairs(base, reader, writer, count, STRIDE: tl.constexpr):
    """Pairs [reader, writer] or, with the two broadcast the other way about, transposed; count: tokens there are."""
    return tl.load(base + reader * STRIDE + writer, mask=reader < count, other=0.0)


@triton.jit
def rows_gradient(
    x, net, pairs, rows, columns, later, G, t, count, operand: tl.constexpr, WIDE: tl.constexpr, ROUNDS: tl.constexpr,
    STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x plus the gradient of the rows of `decayed_pairs`, from those of the pairs, zero for i < j; and net plus what the rows take.

    What rows take and columns give, by token and channel, adds up to the same, but for float32's rounding of sums.
    """
    i = t[:, None]
    j = t[None, :]
    for round in tl.range(0, ROUNDS, disable_licm=True):
        at = meeting(G, round, t, WIDE)
        b = (columns * bounded(at - G)).to(operand)
        y = product(tl.where(met(round, i, j), load_pairs(pairs, i, j, count, STRIDE), 0.0), b, PRECISION)
        up = bounded(later - at)
        x += y * up
        net += y * (rows * up).to(operand).to(tl.float32)
    return x, net


@triton.jit
def columns_gradient(
    x, net, pairs, rows, columns, later, G, t, count, operand: tl.constexpr, WIDE: tl.constexpr, ROUNDS: tl.constexpr,
    STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of the columns; net less what they give."""
    i = t[:, None]
    j = t[None, :]
    for round in tl.range(0, ROUNDS, disable_licm=True):
        at = meeting(G, round, t, WIDE)
        a = (rows * bounded(later - at)).to(operand)
        y = product(tl.where(met(round, i, j), load_pairs(pairs, j, i, count, STRIDE), 0.0), a, PRECISION)
        down = bounded(at - G)
        x += y * down
        net -= y * (columns * down).to(operand).to(tl.float32)
    return x, net
