"""Device functions: the decays of a chunk's key channels, and where its pairs of tokens meet.

A pair's decay is a product of two factors through a token between them, 2^(later_i - G_at) 2^(G_at - G_j), so pairs are
products of matrices. In a chunk that is near, with no channel further than 2^REACH from its middle, all pairs meet there at
once: one of the two factors is then above 1, by as much as a number bears. In a chunk that is far they meet in `rounds`, where
no factor is above 1. Nothing is divided, and no gate is too strong.
"""

import triton
import triton.language as tl

from ..tiles import LEAST_LOG_DECAY, LOG2E, NAN_STAYS, load_numbers, load_rows


@triton.jit
def load_decays(
    log_decay, token, t, valid, channels, stride: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A chunk's log2 decays, [C, BLOCK]. WIDE: in float64, so that differences of their sums are float32's."""
    x = load_rows(log_decay, token, t, valid, channels, stride, D, BLOCK).to(tl.float32)
    x = tl.maximum(x, LEAST_LOG_DECAY, NAN_STAYS)
    if WIDE:
        x = x.to(tl.float64)
    return x * LOG2E


@triton.jit
def load_weights(
    weight, head, token, t, valid, channels, stride, HV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """What keys are multiplied by as they write, in float32: a number a token, [C, 1], or one a channel, [C, BLOCK]."""
    if BY_CHANNEL:
        return load_rows(weight + head * D, token, t, valid, channels, HV * D, D, BLOCK).to(tl.float32)
    else:
        return load_numbers(weight, head, token, t, valid, stride, 1.0, WEIGHTED)[:, None]


@triton.jit
def is_far(x, t, C: tl.constexpr, REACH: tl.constexpr):
    """1 if some channel goes further than 2^REACH in one half of the chunk."""
    early = tl.sum(tl.where((t < C // 2)[:, None], x, 0.0), 0)
    late = tl.sum(tl.where((t < C // 2)[:, None], 0.0, x), 0)
    return tl.max(((early < -REACH) | (late < -REACH)).to(tl.int32), 0)


@triton.jit
def added_up(which, x, part: tl.constexpr):
    """which @ x for a matrix of yes and no and one of float32, as a product: of two parts of x where those have 16 bits."""
    which = tl.where(which, 1.0, 0.0).to(part)
    if part == tl.float32:
        return tl.dot(which, x, input_precision="tf32x3")
    else:
        high = x.to(part)
        return tl.dot(which, (x - high.to(tl.float32)).to(part), acc=tl.dot(which, high))


@triton.jit
def summed(x, t, BEFORE: tl.constexpr, WIDE: tl.constexpr):
    """The log2 decays of a chunk summed: up to and with each token, [C, BLOCK], before it (if BEFORE), and in all, [1, BLOCK]."""
    if WIDE:
        G = tl.cumsum(x, 0)
    else:
        G = added_up(t[:, None] >= t[None, :], x, tl.float16)
    whole = tl.sum(tl.where((t == t.shape[0] - 1)[:, None], G, 0.0), 0)[None, :]
    if BEFORE:
        return G, G - x, whole
    else:
        return G, G, whole


@triton.jit
def middle_of(G, t, C: tl.constexpr):
    """What is summed up to the chunk's middle, [1, BLOCK]."""
    return tl.sum(tl.where((t == C // 2 - 1)[:, None], G, 0.0), 0)[None, :]


@triton.jit
def halves(x, t):
    """The log2 decays of each half of a chunk summed, [1, BLOCK]: made of the tokens, not of G, which costs more."""
    early = (t < t.shape[0] // 2)[:, None]
    return tl.sum(tl.where(early, x, 0.0), 0)[None, :], tl.sum(tl.where(early, 0.0, x), 0)[None, :]


@triton.jit
def from_middle(x, middle, t, WIDE: tl.constexpr):
    """The log2 decays of a chunk summed up to and with each token, [C, BLOCK], less the first of its `halves`."""
    if WIDE:
        return tl.cumsum(x, 0) - middle
    else:
        i = t[:, None]
        j = t[None, :]
        one = tl.full([1, 1], 1.0, tl.float16)  # converting a whole matrix of them takes time
        none = tl.zeros([1, 1], tl.float16)
        upto = tl.where(j < t.shape[0] // 2, tl.where(i < j, -one, none), tl.where(i >= j, one, none))
        high = x.to(tl.float16)
        return tl.dot(upto, (x - high.to(tl.float32)).to(tl.float16), acc=tl.dot(upto, high))


@triton.jit
def power(exponent):
    """2^exponent in float32."""
    return tl.exp2(exponent.to(tl.float32))
