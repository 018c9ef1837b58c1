"""A token and its predecessors weighed channel by channel, and the gradients of that."""

import triton
import triton.language as tl

from ..launch import kernel


@triton.jit
def sequence_of(sequence, t, total, T, PACKED: tl.constexpr):
    """The sequence of each token."""
    if PACKED:
        return tl.load(sequence + t, mask=t < total, other=0)
    else:
        return t // T


@triton.jit
def place_of(index, t, total, T, PACKED: tl.constexpr):
    """How many tokens of its sequence came before each token."""
    if PACKED:
        return tl.load(index + t, mask=t < total, other=0)
    else:
        return t % T


@triton.jit
def load_rows(base, row, inside, channels, D: tl.constexpr):
    """Rows of [rows, D] in float32, zero where not inside."""
    mask = inside[:, None] & (channels < D)[None, :]
    return tl.load(base + row[:, None] * D + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_before(x, history, n, i, t, total, lag, channels, D: tl.constexpr, K: tl.constexpr):
    """The tokens that came `lag` before those at t: of x, of the history, or zero."""
    value = load_rows(x, t - lag, (t < total) & (i >= lag), channels, D)
    if history is not None:
        value += load_rows(history, (n + 1) * (K - 1) + i - lag, (t < total) & (i < lag), channels, D)
    return value


@kernel("total T")
def short_conv_kernel(
    x, weight, history, sequence, index, y, total, T,
    D: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_t = sum_j weight_(K - 1 - j) x_(t - j). x, y: [total, D]; weight: [D, K]; history: [N, K - 1, D] or None."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, i = sequence_of(sequence, t, total, T, PACKED), place_of(index, t, total, T, PACKED)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    for lag in tl.static_range(K):
        w = tl.load(weight + channels * K + (K - 1 - lag), mask=channels < D, other=0.0).to(tl.float32)
        out += load_before(x, history, n, i, t, total, lag, channels, D, K) * w[None, :]
    mask = (t < total)[:, None] & (channels < D)[None, :]
    tl.store(y + t[:, None] * D + channels[None, :], out.to(y.dtype.element_ty), mask=mask)


@kernel("total T")
def short_conv_gradient_kernel(
    x, weight, history, sequence, index, dy, dx, dweight, total, T,
    D: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_j weight_(K - 1 - j) dy_(t + j); dweight: [programs, K, D], of each program's STEPS times ROWS tokens."""
    begin = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for step in range(STEPS):
        t = begin + step * ROWS + tl.arange(0, ROWS)
        n = sequence_of(sequence, t, total, T, PACKED)
        out = tl.zeros([ROWS, BLOCK], tl.float32)
        for lag in tl.static_range(K):
            w = tl.load(weight + channels * K + (K - 1 - lag), mask=channels < D, other=0.0).to(tl.float32)
            later = sequence_of(sequence, t + lag, total, T, PACKED)
            out += load_rows(dy, t + lag, (t + lag < total) & (later == n), channels, D) * w[None, :]
        mask = (t < total)[:, None] & (channels < D)[None, :]
        tl.store(dx + t[:, None] * D + channels[None, :], out.to(dx.dtype.element_ty), mask=mask)
    for lag in tl.static_range(K):
        out = tl.zeros([ROWS, BLOCK], tl.float32)
        for step in range(STEPS):
            t = begin + step * ROWS + tl.arange(0, ROWS)
            n, i = sequence_of(sequence, t, total, T, PACKED), place_of(index, t, total, T, PACKED)
            out += load_before(x, history, n, i, t, total, lag, channels, D, K) * load_rows(dy, t, t < total, channels, D)
        at = dweight + (tl.program_id(0).to(tl.int64) * K + (K - 1 - lag)) * D + channels
        tl.store(at, tl.sum(out, 0), mask=channels < D)
