"""Without ERASE: from what every segment does on its own to the states between segments, or their gradients."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_state, store_state


@kernel("segments")
def segments_kernel(
    initial, local, transfer, between, segments,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STARTED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """between[s] = what enters segment s: Z, then Z <- transfer_s Z + local_s (BACKWARD: from the last one).

    local, between: [N, segments, Hv, dk, dv]; transfer: [N, segments, Hv, dk], a factor a key channel.
    """
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
            z *= tl.load(transfer + place * DK + keys, mask=keys < DK, other=0.0)[None, :]
            z += load_state(local + place * DK * DV, keys, values, DK, DV)
