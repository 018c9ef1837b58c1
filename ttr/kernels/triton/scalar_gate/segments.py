"""From what every segment does on its own to the states between segments (forward), or their gradients (backward)."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_state, product, store_state


@kernel("segments")
def segments_kernel(
    initial, local, transfer, between, segments,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, STARTED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """between[s] = what enters segment s: Z, then Z <- M_s Z + local_s (BACKWARD: from the last one, with M_s transposed).

    local, between: [N, segments, Hv, dk, dv]; transfer: [N, segments, Hv, dk, dk], without ERASE log2 decays [N, segments, Hv].
    """
    ROWS: tl.constexpr = 32 if BK > 32 else BK
    keys = tl.arange(0, BK)
    tiles: tl.constexpr = (DV + BV - 1) // BV
    values = tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    n = (tl.program_id(0) // tiles // HV).to(tl.int64)
    head = tl.program_id(0) // tiles % HV
    z = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        z = load_state(initial + (n * HV + head) * DK * DV, keys, values, DK, DV)
    for step in range(0, segments):
        segment = segments - 1 - step if BACKWARD else step
        place = (n * segments + segment) * HV + head
        store_state(between + place * DK * DV, z, keys, values, DK, DV)
        if step + 1 < segments:
            if ERASE:
                tl.debug_barrier()  # what was just stored is read again, a few channels at a time: a matrix as a whole is too large
                z = load_state(local + place * DK * DV, keys, values, DK, DV)
                for start in range(0, DK, ROWS):
                    rows = start + tl.arange(0, ROWS)
                    mask = (rows < DK)[:, None] & (keys < DK)[None, :]
                    if BACKWARD:
                        pointers = transfer + place * DK * DK + rows[:, None] * DK + keys[None, :]
                    else:
                        pointers = transfer + place * DK * DK + rows[:, None] + keys[None, :] * DK
                    part = load_state(between + place * DK * DV, rows, values, DK, DV)
                    z += product(part, tl.load(pointers, mask=mask, other=0.0), "tf32x3")
            else:
                z *= tl.exp2(tl.load(transfer + place))
                z += load_state(local + place * DK * DV, keys, values, DK, DV)
