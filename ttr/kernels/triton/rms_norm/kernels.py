"""Rows brought to a mean square of one and weighed channel by channel, and the gradients of that."""

import triton.language as tl

from ..launch import kernel
from ..unit_norm.kernels import rates_of, rows_of


@kernel("rows eps")
def rms_norm_kernel(x, weight, y, rates, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y = w r x with r = 1 / sqrt(mean x^2 + eps). x, y: [rows, D]; weight: w, [D]; rates: r, [rows]."""
    tile = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    pointers, inside = rows_of(x, tile, rows, D, BLOCK, ROWS)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    pointers, inside = rates_of(rates, tile, rows, ROWS)
    tl.store(pointers, r, mask=inside)
    pointers, inside = rows_of(y, tile, rows, D, BLOCK, ROWS)
    tl.store(pointers, (value * r[:, None] * w).to(y.dtype.element_ty), mask=inside)


@kernel("rows")
def rms_norm_gradient_kernel(
    x, weight, rates, dy, dx, dweight, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx = r (w dy - r x mean(w dy r x)); dweight = sum of dy r x over a program's rows, [programs, D], STEPS tiles of ROWS each.

    x, dy, dx: [rows, D]; rates: r, [rows].
    """
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(0) * STEPS + step
        pointers, inside = rows_of(x, tile, rows, D, BLOCK, ROWS)
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        pointers, inside = rows_of(dy, tile, rows, D, BLOCK, ROWS)
        given = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        pointers, inside = rates_of(rates, tile, rows, ROWS)
        r = tl.load(pointers, mask=inside, other=0.0)[:, None]
        value *= r
        dw += given * value
        given *= w
        gradient = r * (given - value * (tl.sum(value * given, 1) / D)[:, None])
        pointers, inside = rows_of(dx, tile, rows, D, BLOCK, ROWS)
        tl.store(pointers, gradient.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * D + column, tl.sum(dw, 0), mask=column < D)
