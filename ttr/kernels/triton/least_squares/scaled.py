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


@triton.jit
def packed(x, OPERAND: tl.constexpr):
    """x as operands, in fp16 two neighbours in one integer: a loop carries a half in a register of its own, a pair in one."""
    if tl.float16 == OPERAND:
        low, high = tl.split(tl.reshape(x.to(tl.float16), [x.shape[0], x.shape[1] // 2, 2]))
        low = low.to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return x.to(OPERAND)


@triton.jit
def unpacked(x, OPERAND: tl.constexpr):
    """The inverse of `packed`."""
    if tl.float16 == OPERAND:
        low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return tl.reshape(tl.join(low, high), [x.shape[0], 2 * x.shape[1]])
    else:
        return x
