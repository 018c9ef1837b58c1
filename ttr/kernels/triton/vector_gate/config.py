"""Tile sizes, warps and stages, and into how many segments a sequence is cut: sizes decide, nobody searches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import configs
from ..buffers import Layout, Shapes
from ..configs import Launch
from ..shapes import Sizes, ceil_div

NARROWEST = 64  # channels of a tile in 16 bits: Triton 3.6 compiles narrower ones to wrong numbers or addresses on Hopper


class Config(NamedTuple):
    """chunk: tokens of one. reach: of `around_middle`. Tiles are of key channels in prepare, rows and gradients, else of value channels."""

    chunk: int
    reach: float
    prepare: Launch
    rows: Launch
    forward: Launch
    states: Launch
    reverse: Launch
    pairs: Launch
    values: Launch
    gradients: Launch
    far: Launch
    segments: Launch


def config_of(dtype: torch.dtype, dk: int, dv: int, erase: bool, added: bool, full: bool = False) -> Config:
    """reach is what a number bears: of products of two factors 2^reach, fp16 has few. erase, added: of the rule, in `plan`.

    full: whether heads fill the GPU; with many operands a scan's program then takes all of a head's values, and reads its keys once.
    """
    if dtype == torch.float32:
        tile, few = Launch(32, 4, 1), Launch(16, 4, 1)
        return Config(32, 40.0, tile, tile, tile, tile, tile, tile, tile, tile, few, few)
    reach = 4.0 if dtype == torch.float16 else 40.0
    tile, wide, ahead = Launch(NARROWEST, 4, 1), Launch(128, 4, 1), Launch(NARROWEST, 4, 3)
    if max(dk, dv) > 128:
        forward = states = reverse = Launch(NARROWEST, 8, 1)
    else:  # three stages where they fit in shared memory, and were faster
        forward = Launch(NARROWEST, 4, 2)
        states, reverse = forward if added else ahead, forward if erase else ahead
        if full and erase and dv > NARROWEST:
            forward = reverse = Launch(128, 8, 2)
    return Config(64, reach, tile if added else wide, tile, forward, states, reverse, wide, tile, ahead, tile, Launch(16, 4, 1))


class Choice(NamedTuple):
    """How one call runs. room: for how many segments forward keeps states (0 where no length would be cut)."""

    config: Config
    segments: int
    room: int


@lru_cache(maxsize=4096)
def _choose(arch: str, dtype: torch.dtype, dk: int, dv: int, erase: bool, added: bool, heads: Any, T: Any) -> Choice:
    config, processors = config_of(dtype, dk, dv, erase, added), configs.multiprocessors(arch)
    programs = heads * ceil_div(dv, config.forward.tile)
    if not isinstance(heads, torch.SymInt) and 10 * heads >= 7 * processors:  # no length is cut: of symbols nobody launches
        config = config_of(dtype, dk, dv, erase, added, True)
    pieces = configs.segments(config.chunk, processors, programs, T)
    few: Any = 1 - torch.sym_min(1, programs // max(1, 7 * processors // 10))
    return Choice(config, pieces, few * pieces)


def choose(arch: str, dtype: torch.dtype, dk: int, dv: int, erase: bool, added: bool, heads: Any, T: Any) -> Choice:
    """heads: sequences x value heads. heads and T may be symbols."""
    symbolic = isinstance(heads, torch.SymInt) or isinstance(T, torch.SymInt)
    return (_choose.__wrapped__ if symbolic else _choose)(arch, dtype, dk, dv, erase, added, heads, T)


def rows(s: Sizes, dtype: torch.dtype, erase: bool, added: bool) -> Shapes:
    """What `prepare` makes of a chunk's tokens."""
    names = "queries", "writes", *["looks"] * erase, *["added"] * added
    return dict.fromkeys(names, ((s.tokens, s.HV, s.dk), dtype))


def between(s: Sizes, dtype: torch.dtype, added: bool, config: Config, packed: bool) -> Shapes:
    """What it makes of a whole chunk: of the pairs of its tokens (but for `inverse`), what is left of a state behind it, if it is far."""
    names, chunks = ("reads", *["added_reads", "added_errors"] * added), s.slots(config.chunk, packed)
    of_chunks = {"left": ((chunks, s.HV, s.dk), torch.float32), "far": ((chunks, s.HV), torch.int32)}
    return dict.fromkeys(names, ((s.tokens, s.HV, config.chunk), dtype)) | of_chunks


def saved(s: Sizes, dtype: torch.dtype, erase: bool, added: bool, config: Config, room: int, packed: bool, save: bool = True) -> Layout:
    """What forward makes for backward; without `save`, as much as forward itself needs. room: for how many segments.

    Of the delta rule, backward makes the rows again: that costs less than the memory, which the errors take too.
    """
    out, rest = {}, dict(between(s, dtype, added, config, packed))
    if erase:
        out["inverse"] = rest["reads"]
    if erase and save:
        out["error"] = (s.tokens, s.HV, s.dv), dtype
    # [N, segments, Hv], where sequences are split: the state before each, and its matrix (erase) or a factor a key channel
    pieces = s.N * room * s.HV
    out["starts"] = (pieces, s.dk, s.dv), torch.float32
    out["transfer"] = (pieces, s.dk, s.dk) if erase else (pieces, s.dk), torch.float32
    if save:
        if added:
            out["added_looks"] = rest.pop("added_errors")
        out |= rest if erase else {**rest, **rows(s, dtype, False, False)}
    return Layout(out)
