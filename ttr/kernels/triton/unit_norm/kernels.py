"""Rows brought to length one, and the gradient of that."""

import triton
import triton.language as tl

from ..launch import kernel


@triton.jit
def rows_of(base, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to a program's ROWS rows of [rows, D], and where they are inside."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return base + row[:, None] * D + column[None, :], (row < rows)[:, None] & (column < D)[None, :]


@triton.jit
def rates_of(base, rows, ROWS: tl.constexpr):
    """Pointers to a program's numbers of [rows], and where they are inside."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return base + row, row < rows


@kernel("rows eps")
def unit_norm_kernel(x, y, rates, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y = r x with r = 1 / sqrt(sum x^2 + eps). x, y: [rows, D]; rates: r, [rows]."""
    pointers, inside = rows_of(x, rows, D, BLOCK, ROWS)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) + eps)
    pointers, inside = rates_of(rates, rows, ROWS)
    tl.store(pointers, r, mask=inside)
    pointers, inside = rows_of(y, rows, D, BLOCK, ROWS)
    tl.store(pointers, (value * r[:, None]).to(y.dtype.element_ty), mask=inside)


@kernel("rows")
def unit_norm_gradient_kernel(y, rates, dy, dx, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dx = r (dy - y <y, dy>). y, dy, dx: [rows, D]; rates: r, [rows]."""
    pointers, inside = rows_of(y, rows, D, BLOCK, ROWS)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    pointers, inside = rows_of(dy, rows, D, BLOCK, ROWS)
    given = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    pointers, inside = rates_of(rates, rows, ROWS)
    r = tl.load(pointers, mask=inside, other=0.0)[:, None]
    gradient = r * (given - value * tl.sum(value * given, 1)[:, None])
    pointers, inside = rows_of(dx, rows, D, BLOCK, ROWS)
    tl.store(pointers, gradient.to(dx.dtype.element_ty), mask=inside)
