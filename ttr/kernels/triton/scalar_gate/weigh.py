"""Without ERASE: what is written, U = bV, and from its gradient Y those of V and b."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, store_rows


@kernel("events weight_stride")
def weigh_kernel(
    v, weight, dv, dweight, written, events, weight_stride,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS events of one value head a program. dv: [events, Hv, dv], in place from Y to bY. dweight: [events, Hv], <V, Y>. written: U."""
    head = tl.program_id(1)
    i = tl.arange(0, ROWS)
    event = tl.program_id(0).to(tl.int64) * ROWS
    valid = event + i < events
    channels = tl.arange(0, BV)
    value = load_rows(v + head * DV, event, i, valid, channels, HV * DV, DV, BV).to(tl.float32)
    gradient = load_rows(dv + head * DV, event, i, valid, channels, HV * DV, DV, BV).to(tl.float32)
    b = tl.load(weight + event * weight_stride + i * weight_stride + head, mask=valid, other=0.0)
    tl.store(dweight + (event + i) * HV + head, tl.sum(value * gradient, 1), mask=valid)
    store_rows(dv + head * DV, event, gradient * b[:, None], i, valid, channels, HV * DV, DV, BV)
    store_rows(written + head * DV, event, value * b[:, None], i, valid, channels, HV * DV, DV, BV)
