"""One token of the scalar-gate family. Every program takes [dk, BV] of one state, once in and once out:

    S <- a S,  e = v - k^T S  (no erase: e = v),  S <- S + w k e^T,  o = scale q^T S

Both products with the new state come from the old one's tile, q^T S' = a q^T S + w (q^T k) e^T, so nothing waits twice.
"""

import triton
import triton.language as tl

from ..launch import kernel


@triton.jit
def number_of(numbers, given, b, h, stride_b, stride_h, GIVEN: tl.constexpr):
    """The signal of one head in float32: a tensor's entry, or one number for all."""
    if GIVEN:
        return tl.load(numbers + b * stride_b + h * stride_h).to(tl.float32)
    else:
        return given


@kernel("step_number log_decay_number gain eps scale q_b k_b v_b step_b decay_b")
def step_kernel(
    q, k, v, step, log_decay, state, o, step_number, log_decay_number, gain, eps, scale,
    q_b, k_b, v_b, step_b, decay_b, ALIGNED: tl.constexpr,
    q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr, step_h: tl.constexpr, decay_h: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, STEPS: tl.constexpr, DECAYS: tl.constexpr, RULE: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
):  # fmt: skip
    """q, k: [B, HV / GROUP, dk], v, o: [B, HV, dv], state: [B, HV, dk, dv] float32, contiguous; strides of batch and head.
    ALIGNED: 16 divides the strides of the batch of q, k and v.

    STEPS, DECAYS: step and log_decay are tensors (any strides, 0 included), else step_number and log_decay_number hold.
    RULE: plain | nlms | implicit, the step rule; w = gain times the effective step.
    """
    if ALIGNED:
        q_b, k_b, v_b = tl.multiple_of(q_b, 16), tl.multiple_of(k_b, 16), tl.multiple_of(v_b, 16)
    tiles: tl.constexpr = (DV + BV - 1) // BV
    place = tl.program_id(0)
    tile, memory = place % tiles, (place // tiles).to(tl.int64)
    b, h = memory // HV, memory % HV
    keys, values = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    pointers = state + memory * (DK * DV) + keys[:, None] * DV + values[None, :]
    # a mask that is always true costs registers: the usual sizes have none
    in_keys = None if DK == BK else keys < DK
    in_values = None if DV % BV == 0 else values < DV
    if DK == BK and DV % BV == 0:
        inside = None
    else:
        inside = (keys < DK)[:, None] & (values < DV)[None, :]
    S = tl.load(pointers, mask=inside, other=None if inside is None else 0.0)
    other_key = None if in_keys is None else 0.0
    other_value = None if in_values is None else 0.0
    q_row = tl.load(q + b * q_b + (h // GROUP) * q_h + keys, mask=in_keys, other=other_key).to(tl.float32)
    k_row = tl.load(k + b * k_b + (h // GROUP) * k_h + keys, mask=in_keys, other=other_key).to(tl.float32)
    v_row = tl.load(v + b * v_b + h * v_h + values, mask=in_values, other=other_value).to(tl.float32)
    w = number_of(step, step_number, b, h, step_b, step_h, STEPS)
    keep = tl.exp(number_of(log_decay, log_decay_number, b, h, decay_b, decay_h, DECAYS))

    if RULE == "nlms":
        w = w / (eps + tl.sum(k_row * k_row, 0))
    elif RULE == "implicit":
        w = w / (1.0 + gain * w * tl.sum(k_row * k_row, 0))
    w = w * gain
    error = v_row
    if ERASE:
        look = tl.sum(S * k_row[:, None], 0)
        error = v_row - (look if LOOK_BEFORE else keep * look)
    written = w * error
    read = tl.sum(S * q_row[:, None], 0)
    if not READ_BEFORE:
        read = keep * read + tl.sum(q_row * k_row, 0) * written
    tl.store(pointers, keep * S + k_row[:, None] * written[None, :], mask=inside)
    tl.store(o + memory * DV + values, (scale * read).to(o.dtype.element_ty), mask=in_values)
