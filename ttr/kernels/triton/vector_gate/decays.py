"""Device functions: the decays of a chunk's key channels, and the rounds in which its pairs of tokens meet.

A pair's decay is a product of two factors through a token between them, 2^(later_i - G_at) 2^(G_at - G_j), so pairs are
products of matrices. Where no channel of a chunk strays from its middle by more than 2^REACH, all pairs meet there in one
round: one of the two factors is then above 1, by as much as a number bears. Otherwise the first round takes every token
with itself, and the others halve: round r has the pairs that lie in one block of 2^r tokens, in different halves of it, and
they meet between the halves, where neither factor is above 1. Nothing is divided; no gate is too strong.
"""

import triton
import triton.language as tl

from ..tiles import LEAST_LOG_DECAY, LOG2E, NAN_STAYS, load_rows


@triton.jit
def load_summed(
    log_decay, token, t, valid, channels, stride, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A chunk's log2 decays, summed: up to and with each token, [C, BLOCK], before it, and of the whole chunk, [BLOCK]."""
    x = load_rows(log_decay, token, t, valid, channels, stride, D, BLOCK).to(tl.float32)
    x = tl.maximum(x, LEAST_LOG_DECAY, NAN_STAYS)
    if WIDE:
        x = x.to(tl.float64)
    x *= LOG2E
    G = tl.cumsum(x, 0)
    return G, G - x, tl.sum(tl.where((t == t.shape[0] - 1)[:, None], G, 0.0), 0)


@triton.jit
def rounds_of(G, whole, t, C: tl.constexpr, REACH: tl.constexpr):
    """The number of rounds, and whether it is one."""
    middle = tl.sum(tl.where((t == C // 2 - 1)[:, None], G, 0.0), 0)
    near = tl.max(tl.maximum(-middle, middle - whole, NAN_STAYS), 0) <= REACH
    levels: tl.constexpr = (C >= 2) + (C >= 4) + (C >= 8) + (C >= 16) + (C >= 32) + (C >= 64) + (C >= 128)
    return tl.where(near, 1, 1 + levels), near


@triton.jit
def meeting(G, round, near, t, C: tl.constexpr):
    """What is summed up to where the pairs of a round meet, as G."""
    size = 1 << round
    between = (t & -size) + (size >> 1) - 1
    row = tl.where(near, C // 2 - 1, tl.where(round == 0, t, between))
    return tl.gather(G, tl.broadcast_to(row[:, None], G.shape), 0)


@triton.jit
def towards(exponent, near, REACH: tl.constexpr):
    """2^exponent in float32. What is cut off belongs to no pair of the round."""
    return tl.exp2(tl.minimum(exponent.to(tl.float32), tl.where(near, REACH, 0.0), NAN_STAYS))


@triton.jit
def met(round, near, i, j, C: tl.constexpr, STRICT: tl.constexpr):
    """Whether row i takes of row j in this round. STRICT: never of itself."""
    apart = i ^ j  # in one block of 2^r tokens, in different halves of it: from 2^(r - 1) up to 2^r
    least = tl.where(near, 0, (1 << round) >> 1)
    most = tl.where(near, C, 1 << round)
    inside = (apart >= least) & (apart < most)
    if STRICT:
        return inside & (i > j)
    else:
        return inside & (i >= j)
