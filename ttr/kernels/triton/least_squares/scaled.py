"""Numbers as 16-bit products take them: within 1 by powers of two, so that fp16's eleven bits serve keys and weights of any size."""

import triton
import triton.language as tl


@triton.jit
def power_below(x):
    """A power of two that brings x (>= 0) to between 1/2 and 1, between 2^-60 and 2^60."""
    return tl.exp2(-tl.ceil(tl.minimum(tl.log2(tl.maximum(x, 1e-18)), 60.0)))


@triton.jit
def power_of_rows(x):
    """[rows]: `power_below` of the norm of each row."""
    x = x.to(tl.float32)
    return power_below(tl.sqrt(tl.sum(x * x, 1)))


@triton.jit
def scaled_rows(x, power, OPERAND: tl.constexpr):
    """power x, a product's operand."""
    return (x.to(tl.float32) * power[:, None]).to(OPERAND)
