"""Small kernels that the lints of `ttgir` must find, and their likes that they must not."""

import triton
import triton.language as tl


@triton.jit
def transposed_accumulator(a, b, out, STORED: tl.constexpr):
    """A control of the lint: the pattern, or (STORED) the same transpose on its way to memory."""
    i = tl.arange(0, 64)
    at = i[:, None] * 64 + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    z = tl.trans(tl.dot(x, y)).to(tl.bfloat16)
    if not STORED:
        z = tl.dot(z, y).to(tl.bfloat16)
    tl.store(out + at, z)


@triton.jit
def overwritten_operand(a, b, out, sums, SUMMED: tl.constexpr, TWICE: tl.constexpr):
    """A control of the lint: in a loop that runs ahead, inside another one, an operand that is also (SUMMED) summed, or not; another
    product (TWICE) makes no difference.
    """
    i = tl.arange(0, 64)
    for part in range(2):
        at = part * 65536 + i[:, None] * 256 + i[None, :]
        product = tl.zeros([64, 64], tl.float32)
        again = tl.zeros([64, 64], tl.float32)
        total = tl.zeros([64], tl.float32)
        for start in tl.range(0, 256, 64, num_stages=3):
            x, y = tl.load(a + at + start), tl.load(b + at + start * 256)
            if SUMMED:
                total += tl.sum(y.to(tl.float32), 0)
            product = tl.dot(x, y, acc=product)
            if TWICE:
                again = tl.dot(y, x, acc=again)
        tl.store(out + at, product + again)
        tl.store(sums + part * 64 + i, total)
