"""Without ERASE: what is written, U = bV, and from its gradient Y those of V and b."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, store_rows


@kernel("tokens weight_stride")
def weigh_kernel(
    v, weight, dv, dweight, written, tokens, weight_stride,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one value head a program. dv: [tokens, Hv, dv], in place from Y to bY. dweight: [tokens, Hv], <V, Y>. written: U."""
    head = tl.program_id(1)
    i = tl.arange(0, ROWS)
    token = tl.program_id(0).to(tl.int64) * ROWS
    valid = token + i < tokens
    channels = tl.arange(0, BV)
    value = load_rows(v + head * DV, token, i, valid, channels, HV * DV, DV, BV).to(tl.float32)
    gradient = load_rows(dv + head * DV, token, i, valid, channels, HV * DV, DV, BV).to(tl.float32)
    b = tl.load(weight + token * weight_stride + i * weight_stride + head, mask=valid, other=0.0)
    tl.store(dweight + (token + i) * HV + head, tl.sum(value * gradient, 1), mask=valid)
    store_rows(dv + head * DV, token, gradient * b[:, None], i, valid, channels, HV * DV, DV, BV)
    store_rows(written + head * DV, token, value * b[:, None], i, valid, channels, HV * DV, DV, BV)
