"""Sizes of a call and of what forward keeps for backward: one truth for the launches and for torch.compile's fake kernels.

Nothing here needs triton, and nothing branches on T or N: they may be symbolic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .configs import Config


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def power_of_two(d: int) -> int:
    """The least one that is no less than d."""
    return 1 << (d - 1).bit_length()


class Sizes(NamedTuple):
    """N sequences in `tokens` tokens, T at most in one; H key heads, HV value heads."""

    N: int
    T: int
    tokens: int
    H: int
    HV: int
    dk: int
    dv: int

    def slots(self, block: int, packed: bool) -> int:
        """Blocks of `block` tokens in all sequences; packed, the most there can be."""
        return self.tokens // block + self.N if packed else self.N * ceil_div(self.T, block)


def sizes_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    B, T, H, dk = q.shape
    HV, dv = v.shape[2:]
    return Sizes(B if cu_seqlens is None else cu_seqlens.shape[0] - 1, T, B * T, H, HV, dk, dv)


class Saved(NamedTuple):
    """What forward keeps for backward, each as (shape, dtype); a first axis of length 0 where there is nothing.

    Axes that may be symbols are multiplied into the first one: torch asks of every other whether it is 1, which would
    compile a graph for each answer.
    """

    inverse: tuple[tuple[int, ...], torch.dtype]  # of every chunk's triangular system
    reads: tuple[tuple[int, ...], torch.dtype]  # of every chunk's queries on its keys, decayed (erase)
    error: tuple[tuple[int, ...], torch.dtype]  # as v
    checkpoints: tuple[tuple[int, ...], torch.dtype]  # [blocks of chunks, Hv]: the state before each
    starts: tuple[tuple[int, ...], torch.dtype]  # [N, segments, Hv]: the state before each, where sequences are split
    transfer: tuple[tuple[int, ...], torch.dtype]  # [N, segments, Hv]: a matrix (erase) or a log decay


def saved(s: Sizes, v: Tensor, config: Config, room: int, *, erase: bool, gated: bool, packed: bool, save: bool = True) -> Saved:
    """room: for how many segments. Without `save` as much as forward itself needs."""
    blocks = s.slots(config.chunk * config.every, packed) if save and gated else 0
    pieces = s.N * room * s.HV
    return Saved(
        inverse=((s.tokens if erase else 0, s.HV, config.chunk), v.dtype),
        reads=((s.tokens if erase else 0, s.HV, config.chunk), v.dtype),
        error=(tuple(v.shape) if save and erase else (0,), v.dtype),
        checkpoints=((blocks * s.HV, s.dk, s.dv), v.dtype),
        starts=((pieces, s.dk, s.dv), torch.float32),
        transfer=((pieces, s.dk, s.dk) if erase else (pieces,), torch.float32),
    )
