"""Tokens of a chunk and the launches of the kernels, importable without triton."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Channels of a tile (of those that the kernel goes over in tiles), warps, stages."""

    tile: int
    warps: int
    stages: int = 1


class Tiling(NamedTuple):
    chunk: int
    prepare: Launch
    forward: Launch
    starts: Launch
    reverse: Launch
    pairs: Launch
    tokens: Launch


@cache
def tiling_of(dtype: torch.dtype, device: str, full: bool = False) -> Tiling:
    """full: whether heads fill the GPU; `starts` then takes all of a head's states in one program, and reads its keys and errors once."""
    if device == "cpu":  # the interpreter
        return Tiling(16, *[Launch(16, 4)] * 6)
    if dtype == torch.float32:
        return Tiling(16, Launch(0, 1), Launch(32, 4), Launch(32, 4), Launch(32, 4), Launch(0, 1), Launch(16, 1))
    scan = Launch(64, 4, 2)
    return Tiling(64, Launch(0, 4), scan, Launch(128, 8, 2) if full else scan, scan, Launch(0, 4), Launch(32, 4, 2))
