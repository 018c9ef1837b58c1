"""From what every segment does to H on its own to H between segments, or its gradients."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_block


@kernel("segments")
def join_kernel(
    initial, local, transfer, between, segments,
    HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, STARTED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """between[s] = what enters segment s: Z, then Z <- transfer_s Z transfer_s + local_s (BACKWARD: from the last one).

    local, between: [N, segments, Hv, dk, dk]; transfer: [N, segments, Hv, dk], a factor a channel.
    """
    keys = tl.arange(0, BK)
    tiles: tl.constexpr = (DK + TILE - 1) // TILE
    values = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    n = (tl.program_id(0) // tiles // HV).to(tl.int64)
    head = tl.program_id(0) // tiles % HV
    z = tl.zeros([BK, TILE], tl.float32)
    if STARTED:
        z = load_block(initial + (n * HV + head) * DK * DK, keys, values, DK, DK)
    inside = (keys < DK)[:, None] & (values < DK)[None, :]
    for step in range(0, segments):
        segment = segments - 1 - step if BACKWARD else step
        place = (n * segments + segment) * HV + head
        tl.store(between + place * DK * DK + keys[:, None] * DK + values[None, :], z, mask=inside)
        if step + 1 < segments:
            left = tl.load(transfer + place * DK + keys, mask=keys < DK, other=0.0)
            z *= left[:, None] * tl.load(transfer + place * DK + values, mask=values < DK, other=0.0)[None, :]
            z += load_block(local + place * DK * DK, keys, values, DK, DK)
