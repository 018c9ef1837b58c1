"""Rows brought to a mean square of one and weighed channel by channel, and the gradients of that."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, store_rows


@kernel("rows eps")
def rms_norm_kernel(x, weight, y, rates, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y = w r x with r = 1 / sqrt(mean x^2 + eps). x, y: [rows, D]; weight: w, [D]; rates: r, [rows]."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    t = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = first + t < rows
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    value = load_rows(x, first, t, inside, columns, D, D, BLOCK).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rates + first + t, r, mask=inside)
    store_rows(y, first, value * r[:, None] * w, t, inside, columns, D, D, BLOCK)


@kernel("rows")
def rms_norm_gradient_kernel(
    x, weight, rates, dy, dx, dweight, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx = r (w dy - r x mean(w dy r x)); dweight = sum of dy r x over a program's rows, [programs, D], STEPS tiles of ROWS each.

    x, dy, dx: [rows, D]; rates: r, [rows].
    """
    t = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step).to(tl.int64) * ROWS
        inside = first + t < rows
        value = load_rows(x, first, t, inside, columns, D, D, BLOCK).to(tl.float32)
        given = load_rows(dy, first, t, inside, columns, D, D, BLOCK).to(tl.float32)
        r = tl.load(rates + first + t, mask=inside, other=0.0)[:, None]
        value *= r
        dw += given * value
        given *= w
        gradient = r * (given - value * (tl.sum(value * given, 1) / D)[:, None])
        store_rows(dx, first, gradient, t, inside, columns, D, D, BLOCK)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(dw, 0), mask=columns < D)
