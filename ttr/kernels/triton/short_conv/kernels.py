"""A token and its predecessors weighed channel by channel, with or without SiLU behind, and the gradients of that."""

import triton
import triton.language as tl

from ..launch import kernel


@triton.jit
def place_of(sequence, index, t, total, T, PACKED: tl.constexpr):
    """The sequence of each token, and how many tokens of it came before."""
    if PACKED:
        return tl.load(sequence + t, mask=t < total, other=0), tl.load(index + t, mask=t < total, other=0)
    else:
        n = t // T
        return n, t - n * T


@triton.jit
def follows(sequence, n, i, t, lag, total, T, PACKED: tl.constexpr):
    """Whether the token `lag` after each at t belongs to its sequence."""
    if PACKED:
        return (t + lag < total) & (tl.load(sequence + t + lag, mask=t + lag < total, other=-1) == n)
    else:
        return (t + lag < total) & (i + lag < T)


@triton.jit
def load_rows(base, row, inside, channels, D: tl.constexpr):
    """Rows of [rows, D] in float32, zero where not inside."""
    mask = inside[:, None] & (channels < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * D + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, t, x, total, channels, D: tl.constexpr):
    """Rows of [total, D], those that there are."""
    mask = (t < total)[:, None] & (channels < D)[None, :]
    tl.store(base + t.to(tl.int64)[:, None] * D + channels[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_before(x, history, n, i, t, total, lag, channels, D: tl.constexpr, K: tl.constexpr):
    """The tokens that came `lag` before those at t: of x, of the history, or zero."""
    value = load_rows(x, t - lag, (t < total) & (i >= lag), channels, D)
    if history is not None:
        value += load_rows(history, (n + 1) * (K - 1) + i - lag, (t < total) & (i < lag), channels, D)
    return value


@kernel("total T")
def short_conv_kernel(
    x, weight, history, sequence, index, given, y, total, T,
    D: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z_t = sum_j weight_(K - 1 - j) x_(t - j), and y = z, or z sigmoid(z) with SILU; where a gradient of that is `given`, y is z's.

    x, given, y: [total, D]; weight: [D, K]; history: [N, K - 1, D] or None.
    """
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, i = place_of(sequence, index, t, total, T, PACKED)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    for lag in tl.static_range(K):
        w = tl.load(weight + channels * K + (K - 1 - lag), mask=channels < D, other=0.0).to(tl.float32)
        out += load_before(x, history, n, i, t, total, lag, channels, D, K) * w[None, :]
    if SILU:
        half = tl.sigmoid(out)
        if given is None:
            out *= half
        else:
            out = load_rows(given, t, t < total, channels, D) * half * (1.0 + out * (1.0 - half))
    store_rows(y, t, out, total, channels, D)


@kernel("total T")
def short_conv_gradient_kernel(
    x, weight, history, sequence, index, dy, dx, dweight, total, T,
    D: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_j weight_(K - 1 - j) dy_(t + j); dweight_(K - 1 - j) = sum_t x_t dy_(t + j), [programs, K, D]: over a program's tokens.

    STEPS tiles of ROWS tokens a program: over its tiles sums are made within threads, between them once.
    """
    begin = tl.program_id(0) * (ROWS * STEPS)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = (tl.zeros([ROWS, BLOCK], tl.float32),) * K
    for step in range(STEPS):
        t = begin + step * ROWS + tl.arange(0, ROWS)
        n, i = place_of(sequence, index, t, total, T, PACKED)
        value = load_rows(x, t, t < total, channels, D)
        out = tl.zeros([ROWS, BLOCK], tl.float32)
        added = ()
        for lag in tl.static_range(K):
            w = tl.load(weight + channels * K + (K - 1 - lag), mask=channels < D, other=0.0).to(tl.float32)
            inside = follows(sequence, n, i, t, lag, total, T, PACKED)
            given = load_rows(dy, t + lag, inside, channels, D)
            out += given * w[None, :]
            dw = sums[lag] + given * tl.where(inside[:, None], value, 0.0)  # what nobody reads may be infinite
            if history is not None:
                before = load_rows(history, (n + 1) * (K - 1) + i - lag, (t < total) & (i < lag), channels, D)
                dw += before * load_rows(dy, t, (t < total) & (i < lag), channels, D)
            added = added + (dw,)  # noqa: RUF005 - Triton knows no starred one
        sums = added
        store_rows(dx, t, out, total, channels, D)
    for lag in tl.static_range(K):
        at = dweight + (tl.program_id(0) * K + (K - 1 - lag)).to(tl.int64) * D + channels
        tl.store(at, tl.sum(sums[lag], 0), mask=channels < D)
