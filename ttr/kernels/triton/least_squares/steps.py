"""Device functions: steps of conjugate gradients from x = 0, every row a system of its own.

    s = |r| / <p, y>,     x <- x + s p,     r <- r - s y,     p <- r / |r| + (|r| / |r before|) p

p is the direction of the method divided by |r|: of any size of q it stays near 1, so that fp16 holds it, and its rounded
numbers are the direction that x and r move along. A row whose |r| is below tolerance |q| stops.
"""

import triton
import triton.language as tl

from .scaled import packed

LEAST = tl.constexpr(1e-37)  # of a divisor


@triton.jit
def begun(r, tolerance, OPERAND: tl.constexpr):
    """Of r = q: x, |r|, the |r| at which a row stops, and p, `packed`."""
    now = tl.sqrt(tl.sum(r * r, 1))
    solution = r * 0.0  # what is not finite stays so
    return solution, now, tolerance * now, packed(r * (1.0 / tl.maximum(now, LEAST))[:, None], OPERAND)


@triton.jit
def moved(solution, r, now, least, direction, y, power, OPERAND: tl.constexpr):
    """x, r, |r| and p, `packed`, one step on. y: the matrices times `direction`, times `power`, one for all rows or one a row."""
    along = tl.sum(direction * y, 1)
    moving = (now > least) & ~(along <= 0)  # along <= 0: rounding has left nothing positive
    move = tl.where(moving, now / tl.where(moving, along, 1.0), 0.0)
    solution += (move * power)[:, None] * direction
    r -= move[:, None] * y
    left = tl.sqrt(tl.sum(r * r, 1))
    ratio = tl.where(moving, left / tl.maximum(now, LEAST), 0.0)
    now = tl.where(moving, left, now)
    return solution, r, now, packed(r * (1.0 / tl.maximum(now, LEAST))[:, None] + ratio[:, None] * direction, OPERAND)
