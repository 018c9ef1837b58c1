"""Sizes of a call and of what forward keeps for backward: one truth for the launches and for torch.compile's fake kernels.

Nothing here needs triton, and nothing branches on T or N: they may be symbolic.
"""

from __future__ import annotations

from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from .buffers import Layout
from .configs import Config


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def power_of_two(d: int) -> int:
    """The least one that is no less than d; triton's own costs microseconds a call."""
    return 1 << (d - 1).bit_length()


class Sizes(NamedTuple):
    """N sequences in `tokens` tokens, T at most in one; H key heads, HV value heads; a token is `steps` events."""

    N: int
    T: int
    tokens: int
    H: int
    HV: int
    dk: int
    dv: int
    steps: int = 1

    @property
    def events(self) -> int:
        return self.tokens * self.steps

    def slots(self, block: int, packed: bool) -> int:
        """Blocks of `block` events in all sequences; packed, the most there can be."""
        return self.events // block + self.N if packed else self.N * ceil_div(self.T * self.steps, block)


def sizes_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    B, T, H, dk = q.shape
    HV, dv = v.shape[-2:]
    return Sizes(B if cu_seqlens is None else cu_seqlens.shape[0] - 1, T, B * T, H, HV, dk, dv, steps_of(v))


def steps_of(v: Tensor) -> int:
    """Of [B, T, Hv, dv] or [B, T, n, Hv, dv]; a number, also where T is a symbol."""
    return index(v.shape[2]) if v.ndim == 5 else 1


def saved(
    s: Sizes, dtype: torch.dtype, config: Config, room: int, *, erase: bool, gated: bool, learned: bool, packed: bool, save: bool = True
) -> Layout:
    """What forward makes for backward; without `save`, as much as forward itself needs.

    learned: whether the log decay, if there is one, wants a gradient. room: for how many segments; their arrays come last.
    """
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if gated:  # the summed log decays of every chunk
        out["decays"] = (s.events, s.HV), torch.float64 if dtype == torch.float32 else torch.float32
        out["bounds"] = (s.slots(config.chunk, packed) * s.HV,), torch.float32  # log2 of the most that a chunk leaves of a state
    if erase:  # of every chunk its triangular system, inverted, and its queries on its keys, decayed
        out["inverse"] = (s.events, s.HV, config.chunk), dtype
        out["reads"] = (s.tokens, s.HV, config.chunk), dtype
    if save and erase:
        out["error"] = (s.events, s.HV, s.dv), dtype
    if save and gated and learned:  # [blocks of chunks, Hv]: the state before the last chunk of each
        out["checkpoints"] = (s.slots(config.chunk * config.every, packed) * s.HV, s.dk, s.dv), dtype
    # [N, segments, Hv], where sequences are split: the state before each, and its matrix (erase) or log decay
    pieces = s.N * room * s.HV
    out["starts"] = (pieces, s.dk, s.dv), torch.float32
    out["transfer"] = (pieces, s.dk, s.dk) if erase else (pieces,), torch.float32
    return Layout(out)
