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
def remaining(x, t, WIDE: tl.constexpr):
    """The log2 decays of a chunk summed behind each token, [C, BLOCK]."""
    if WIDE:
        return tl.sum(x, 0)[None, :] - tl.cumsum(x, 0)
    else:
        return added_up(t[:, None] < t[None, :], x, tl.float16)


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
def order(C: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk's tokens, [C], in the order in which `around_middle` wants them; `in_order` puts rows back.

    A thread of four warps that loads 8 channels of a row at once has BLOCK / 16 rows of [C, BLOCK], far apart; in this order
    they are a run of tokens. What is summed within a run is then summed within a thread.
    """
    RUN: tl.constexpr = BLOCK // 16
    row = tl.arange(0, C)
    return row % (C // RUN) * RUN + row // (C // RUN)


@triton.jit
def in_order(x):
    """Rows that came in `order`, in that of their tokens. Nothing moves between threads."""
    C: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    RUN: tl.constexpr = BLOCK // 16
    return tl.reshape(tl.permute(tl.reshape(x, (RUN, C // RUN, BLOCK)), (1, 0, 2)), (C, BLOCK))


@triton.jit
def around_middle(x, REACH: tl.constexpr):
    """Log2 decays in `order` summed from the chunk's middle on, so that what lies before it is above 0: up to and with each token
    and before it, [C, BLOCK]; summed over the first half and over the second, [1, BLOCK]; which channels are far: in one of the halves
    further than 2^REACH. Their sums from the middle are 0.
    """
    C: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    RUN: tl.constexpr = BLOCK // 16
    tl.static_assert(C % (4 * RUN) == 0)  # each of four quarters of the chunk has whole runs
    runs = tl.reshape(x, (RUN, 4, C // RUN // 4, BLOCK))  # a warp has a quarter of the chunk
    totals = tl.sum(runs, 0, keep_dims=True)
    even, odd = tl.split(tl.reshape(tl.permute(tl.sum(totals, 2), (2, 1, 0)), (BLOCK, 2, 2)))
    one, three = tl.split(even)
    two, four = tl.split(odd)
    first = (one + two)[None, :]
    second = (three + four)[None, :]
    far = (first < -REACH) | (second < -REACH)
    near = tl.where(far, 0.0, 1.0).to(x.dtype)
    quarter = tl.arange(0, 4)[:, None]
    start = tl.where(quarter < 2, tl.where(quarter == 0, -first, -two[None, :]), tl.where(quarter == 2, 0.0, three[None, :]))
    start = (tl.cumsum(totals, 2) - totals + start[None, :, None, :]) * near[None, None, :, :]
    G = tl.reshape(tl.cumsum(runs, 0) * near[None, None, :, :] + start, (C, BLOCK))
    return G, G - x * near, first, second, far


@triton.jit
def power(exponent):
    """2^exponent in float32."""
    return tl.exp2(exponent.to(tl.float32))
