"""One token of a linear recurrence of one slot, whatever its numbers are per. Every program takes [dk, BV] of one state:

    S <- a S, and for every pair (k, v) of the token    e = v - k^T S,  S <- S + (w * k) e^T + p v^T,    o = scale q^T S

a and w are a number a head or one a key channel, w one a value channel as well; p: keys of their own for what is written of
v, then e = -k^T S. No erase: e without k^T S.
"""

import triton
import triton.language as tl

from ..launch import kernel


@triton.jit
def signal_of(numbers, given, place, keys, values, BY: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """In float32, over [keys, values] or one of either: BY number (`given`, for all), head, key or value."""
    if BY == "number":
        return given
    elif BY == "head":
        return tl.load(numbers + place).to(tl.float32)
    elif BY == "key":
        return tl.load(numbers + place + keys, mask=keys < DK, other=0.0).to(tl.float32)
    else:
        tl.static_assert(BY == "value")
        return tl.load(numbers + place + values, mask=values < DV, other=0.0).to(tl.float32)


@kernel("step_number log_decay_number gain written eps scale q_b k_b k_n v_b v_n p_b p_n step_b step_n decay_b")
def events_kernel(
    q, k, v, p, step, log_decay, state, o, step_number, log_decay_number, gain, written, eps, scale,
    q_b, k_b, k_n, v_b, v_n, p_b, p_n, step_b, step_n, decay_b,
    q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr, p_h: tl.constexpr, step_h: tl.constexpr, decay_h: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PAIRS: tl.constexpr, ERASE: tl.constexpr, STEP: tl.constexpr, DECAY: tl.constexpr, RULE: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
):  # fmt: skip
    """q: [B, HV / GROUP, dk]; k, p: [B, PAIRS, HV / GROUP, dk]; v: [B, PAIRS, HV, dv]; o: [B, HV, dv]; state: [B, HV, dk, dv] float32,
    contiguous; step: [B, PAIRS, HV] or with dk or dv behind; log_decay: [B, HV] or [B, HV, dk]; strides of all but the last axis.

    STEP, DECAY: as in `signal_of`. RULE: plain | nlms | implicit, the step rule; w = gain times the effective step. written: p's factor.
    """
    tiles: tl.constexpr = (DV + BV - 1) // BV
    place = tl.program_id(0)
    tile, memory = place % tiles, (place // tiles).to(tl.int64)
    b, h = memory // HV, memory % HV
    keys, values = tl.arange(0, BK)[:, None], (tile * BV + tl.arange(0, BV))[None, :]
    pointers = state + memory * (DK * DV) + keys * DV + values
    inside = (keys < DK) & (values < DV)
    S = tl.load(pointers, mask=inside, other=0.0)
    q_row = tl.load(q + b * q_b + (h // GROUP) * q_h + keys, mask=keys < DK, other=0.0).to(tl.float32)
    read = tl.sum(S * q_row, 0)
    keep = tl.exp(signal_of(log_decay, log_decay_number, b * decay_b + h * decay_h, keys, values, DECAY, DK, DV))
    for pair in tl.static_range(PAIRS):
        k_row = tl.load(k + b * k_b + pair * k_n + (h // GROUP) * k_h + keys, mask=keys < DK, other=0.0).to(tl.float32)
        v_row = tl.load(v + b * v_b + pair * v_n + h * v_h + values, mask=values < DV, other=0.0).to(tl.float32)
        w = signal_of(step, step_number, b * step_b + pair * step_n + h * step_h, keys, values, STEP, DK, DV)
        if RULE == "nlms":
            w = w / (eps + tl.sum(k_row * k_row))
        elif RULE == "implicit":
            w = w / (1.0 + gain * tl.sum(w * k_row * k_row, 0, keep_dims=True))
        before = S
        if pair == 0:
            S = keep * S
        error = v_row
        if p is not None:
            error = tl.zeros_like(v_row)
        if ERASE:
            error -= tl.sum(k_row * (before if LOOK_BEFORE else S), 0, keep_dims=True)
        S += (gain * w) * k_row * error
        if p is not None:
            p_row = tl.load(p + b * p_b + pair * p_n + (h // GROUP) * p_h + keys, mask=keys < DK, other=0.0).to(tl.float32)
            S += (written * p_row) * v_row
    if not READ_BEFORE:
        read = tl.sum(S * q_row, 0)
    tl.store(pointers, S, mask=inside)
    tl.store(o + memory * DV + tile * BV + tl.arange(0, BV), (scale * read).to(o.dtype.element_ty), mask=tile * BV + tl.arange(0, BV) < DV)
