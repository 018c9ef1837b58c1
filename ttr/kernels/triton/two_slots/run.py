"""The launches of one call, forward and backward."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..launch import Bound, prepare
from ..shapes import Sizes, ceil_div, power_of_two, sizes_of
from .forward import forward_kernel
from .levels import levels_kernel
from .levels_gradient import levels_gradient_kernel
from .pairs import pairs_kernel
from .prepare import prepare_kernel
from .reverse import reverse_kernel
from .starts import starts_kernel
from .tiling import Launch, Tiling, tiling_of
from .tokens import tokens_kernel


class Rule(NamedTuple):
    """erase: the error is taken at the states. before: queries read before their token's update."""

    erase: bool
    before: bool


rule_of = cache(Rule)


class Kind(NamedTuple):
    """All that decides the launches of a call. save: whether backward follows; ended: whether the last states have a gradient."""

    sizes: Sizes
    dtype: torch.dtype
    device: int
    started: bool
    packed: bool
    rule: Rule
    tiling: Tiling
    save: bool
    ended: bool

    @property
    def slots(self) -> int:
        return self.sizes.slots(self.tiling.chunk, self.packed)

    @property
    def levels(self) -> int:
        return self.tiling.chunk.bit_length() - 1


def kind_of(q, v, first, cu_seqlens, rule: Rule, tiling: Tiling | None, save: bool, ended: bool) -> Kind:
    s = sizes_of(q, v, cu_seqlens)
    full = 7 * configs.multiprocessors(configs.arch_of(q.device)) <= 10 * s.N * s.HV
    tiling = tiling or tiling_of(q.dtype, q.device.type, full)
    return Kind(
        s, q.dtype, q.get_device(), first is not None, cu_seqlens is not None, rule, tiling, save, ended
    )  # fmt: skip


@lru_cache(maxsize=1024)
def launches(kind: Kind) -> dict[str, Bound]:
    """Those of both passes; each is compiled when it is first called."""
    s, tiling, (erase, before) = kind.sizes, kind.tiling, kind.rule
    wide = {"BK": max(16, power_of_two(s.dk)), "BV": max(16, power_of_two(s.dv))}
    few: dict[str, Any] = {"HV": s.HV, "C": tiling.chunk, "LEVELS": kind.levels, "PACKED": kind.packed}
    whole = {"H": s.H, "DK": s.dk, "DV": s.dv, "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32", **wide, **few}
    chunks, heads = (kind.slots, s.HV), s.N * s.HV

    def bind(kernel, grid: tuple[int, ...], launch: Launch, leave: str = "", **more: Any) -> Bound:
        constants = {name: x for name, x in whole.items() if name not in leave.split()}
        return kernel.bind(grid, launch.warps, launch.stages, **constants | more)

    def over_values(kernel, launch: Launch) -> Bound:
        """A scan; a program takes a tile of value channels."""
        tile = min(launch.tile, wide["BV"])
        return bind(kernel, (ceil_div(s.dv, tile) * heads,), launch, ERASE=erase, BV=tile)

    rows, columns = (min(tiling.starts.tile, wide[name]) for name in ("BK", "BV"))
    tiles = ceil_div(s.dk, rows) * ceil_div(s.dv, columns)
    return {
        "levels": levels_kernel.bind(chunks, 1, BEFORE=before, **few),
        "levels, kept": levels_kernel.bind(chunks, 1, BEFORE=before, **few),  # with transitions: a launch knows which tensors are None
        "levels_gradient": levels_gradient_kernel.bind(chunks, 1, ERASE=erase, BEFORE=before, **few),
        "prepare": bind(prepare_kernel, (kind.slots, s.H), tiling.prepare, "DV BV", ERASE=erase),
        "forward": over_values(forward_kernel, tiling.forward),
        "starts": bind(starts_kernel, (tiles * heads,), tiling.starts, BK=rows, BV=columns),
        "reverse": over_values(reverse_kernel, tiling.reverse),
        "pairs": bind(pairs_kernel, chunks, tiling.pairs, ERASE=erase),
        "tokens": bind(tokens_kernel, chunks, tiling.tokens, ERASE=erase, BK=min(tiling.tokens.tile, wide["BK"])),
    }  # fmt: skip


def level_arrays(kind: Kind, q: Tensor, back: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """levels, mixing and, on the way back, transitions."""
    lead, C = (kind.slots, kind.sizes.HV), kind.tiling.chunk
    rows, mixing = (q.new_empty(*lead, *shape, dtype=torch.float32) for shape in ((6 * kind.levels + 7, C), (4,)))
    return rows, mixing, q.new_empty(*lead, kind.levels, 4, C, dtype=torch.float32) if back else None


def forward(q, k, v, numbers, first, cu_seqlens, scale: float, rule: Rule, save: bool, tiling: Tiling | None = None):
    """o, the last states [N, Hv, 2, dk, dv], and with save what backward needs: reads and, with erase, error and inverse."""
    if q.is_cuda:
        prepare()
    kind = kind_of(q, v, first, cu_seqlens, rule, tiling, save, False)
    run, s = launches(kind), kind.sizes
    levels, mixing, transitions = level_arrays(kind, q, False)
    run["levels"](numbers, levels, mixing, transitions, cu_seqlens, s.N, s.T, s.tokens, scale)
    reads = q.new_empty(*q.shape[:2], s.HV, kind.tiling.chunk)
    inverse = torch.empty_like(reads) if rule.erase else None
    error = torch.empty_like(v) if rule.erase and save else None
    run["prepare"](q, k, levels, inverse, reads, cu_seqlens, s.N, s.T)
    o, last = torch.empty_like(v), q.new_empty(s.N, s.HV, 2, s.dk, s.dv, dtype=torch.float32)
    run["forward"](q, k, v, levels, mixing, inverse, reads, first, o, error, last, cu_seqlens, s.T)
    return o, last, [x for x in (reads, error, inverse) if x is not None] if save else []


def backward(
    do, dlast, q, k, v, numbers, first, cu_seqlens, saved: list[Tensor], scale: float, rule: Rule, tiling: Tiling | None = None
):  # fmt: skip
    """dq, dk, dv, dnumbers and dfirst (None if there was no first)."""
    if q.is_cuda:
        prepare()
    reads, error, inverse = saved if rule.erase else (*saved, v, None)
    kind = kind_of(q, v, first, cu_seqlens, rule, tiling, True, dlast is not None)
    run, s = launches(kind), kind.sizes
    levels, mixing, transitions = level_arrays(kind, q, True)
    run["levels, kept"](numbers, levels, mixing, transitions, cu_seqlens, s.N, s.T, s.tokens, scale)
    starts, ends = (q.new_empty(kind.slots, s.HV, 2, s.dk, s.dv) for _ in range(2))
    run["starts"](k, error, levels, mixing, first, starts, cu_seqlens, s.T)
    dv, dfirst = torch.empty_like(v), None if first is None else torch.empty_like(first)
    run["reverse"](q, k, levels, mixing, inverse, reads, do, dlast, dv, ends, dfirst, cu_seqlens, s.T)
    read_pairs, look_pairs = torch.empty_like(reads), torch.empty_like(reads) if rule.erase else None
    dlevels, dmixing = torch.empty_like(levels), torch.empty_like(mixing)
    run["pairs"](q, k, error, do, dv, levels, read_pairs, look_pairs, dlevels, cu_seqlens, s.N, s.T)
    dq, dk = (q.new_empty(*q.shape[:2], s.HV, s.dk) for _ in range(2))
    run["tokens"](
        q, k, error, do, dv, read_pairs, look_pairs, levels, starts, ends, dq, dk, dlevels, dmixing, cu_seqlens, s.N, s.T
    )  # fmt: skip
    dnumbers = torch.empty_like(numbers)
    run["levels_gradient"](numbers, levels, transitions, dlevels, dmixing, dnumbers, cu_seqlens, s.N, s.T, s.tokens, scale)
    if s.HV != s.H:
        dq, dk = (x.unflatten(2, (s.H, s.HV // s.H)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dnumbers, dfirst
