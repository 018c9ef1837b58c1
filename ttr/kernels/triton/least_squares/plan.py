"""Which kernels a call launches, and how: decided once for all calls of its kind."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

from .. import configs
from ..launch import Bound
from ..scalar_gate.decays import cumulate_kernel
from ..scalar_gate.segments import segments_kernel
from ..shapes import Sizes, ceil_div, power_of_two, sizes_of
from .exact import NO_GATE, OF_CHANNEL, OF_HEAD, solve_exactly_kernel
from .solve import solve_kernel
from .statistics import statistics_kernel


class Form(NamedTuple):
    """iterations, tolerance: of `cg`; without iterations the solve is exact. before: reads stand before the token's own pair."""

    scale: float
    iterations: int | None
    tolerance: float
    before: bool


form_of = cache(Form)


class Options(NamedTuple):
    """chunk: tokens solved for at once. tile: columns of H a program of the scan carries. finest: see `options`."""

    chunk: int
    tile: int
    scan_warps: int
    scan_stages: int
    solve_warps: int
    finest: float


def options(dk: int, dtype: torch.dtype) -> Options:
    """Static. finest: the residual, beside |q|, below which products of these operands resolve nothing: there a row stops."""
    if dtype == torch.float32:
        return Options(32, 64, 4, 1, 8 if dk > 64 else 4, torch.finfo(dtype).eps)
    if dk > 128:
        return Options(64, 64, 8, 1, 8, 2.0**-13)
    return Options(64, 64, 4, 2, 4, 2.0**-13)


class Kind(NamedTuple):
    """All that decides the launches of a call. log_decay, weight: axes, None where there is none."""

    sizes: Sizes
    dtype: torch.dtype
    device: int
    log_decay: int | None
    weight: int | None
    started: bool
    packed: bool
    before: bool
    arch: str
    options: Options


def kind_of(k, v, log_decay, weight, first_H, cu_seqlens, before: bool) -> Kind:
    log_decay_axes, weight_axes = (None if x is None else x.ndim for x in (log_decay, weight))
    return Kind(
        sizes_of(k, v, cu_seqlens), k.dtype, k.get_device(), log_decay_axes, weight_axes, first_H is not None, cu_seqlens is not None,
        before, configs.arch_of(k.device), options(k.shape[3], k.dtype),
    )  # fmt: skip


class Plan:
    """The launches of calls of one kind; each is made when it is first asked for."""

    def __init__(self, kind: Kind):
        s, o = kind.sizes, kind.options
        self.kind, self.gated = kind, kind.log_decay is not None
        self.operand = torch.float32 if kind.dtype == torch.float32 else torch.float16
        self.decays_dtype = torch.float64 if kind.dtype == torch.float32 else torch.float32
        self.blocks, self.tiles = s.slots(o.chunk, kind.packed), ceil_div(s.dk, o.tile)
        self.segments = configs.segments(o.chunk, configs.multiprocessors(kind.arch), s.N * s.HV * self.tiles, s.T)
        self.segment_chunks = ceil_div(ceil_div(s.T, o.chunk), self.segments)
        self.decay_stride, self.weight_stride = (s.HV if axes == 3 else 0 for axes in (kind.log_decay, kind.weight))
        self.solves: dict[tuple[int, bool, bool], Bound] = {}
        self.constants: dict[str, Any] = {
            "H": s.H, "HV": s.HV, "DK": s.dk, "BK": max(16, power_of_two(s.dk)), "C": o.chunk, "GATED": self.gated,
            "WEIGHTED": kind.weight is not None, "PACKED": kind.packed,
            "OPERAND": tl.float32 if self.operand == torch.float32 else tl.float16,
            "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    @cached_property
    def cumulate(self) -> Bound:
        s, kind = self.kind.sizes, self.kind
        heads = min(16, power_of_two(s.HV))
        constants = {"HV": s.HV, "BH": heads, "C": kind.options.chunk, "STEPS": 1, "ERASE": False, "WIDE": kind.dtype == torch.float32}
        return cumulate_kernel.bind((self.blocks, ceil_div(s.HV, heads)), 4, **constants, PACKED=kind.packed)

    def scan(self, started: bool, local: bool) -> Bound:
        s, o = self.kind.sizes, self.kind.options
        grid = self.tiles * s.N * s.HV, self.segments - 1 if local else self.segments
        constants = {**self.constants, "TILE": o.tile, "STARTED": started, "LOCAL": local}
        return statistics_kernel.bind(grid, o.scan_warps, o.scan_stages, **constants)

    @cached_property
    def local(self) -> Bound:
        return self.scan(False, True)

    @cached_property
    def joined(self) -> Bound:
        s = self.kind.sizes
        constants = {"HV": s.HV, "DK": s.dk, "DV": s.dk, "BK": self.constants["BK"], "BV": 16, "ERASE": False}
        return segments_kernel.bind((ceil_div(s.dk, 16) * s.N * s.HV,), 4, **constants, STARTED=self.kind.started, BACKWARD=False)

    @cached_property
    def whole(self) -> Bound:
        return self.scan(self.kind.started or self.segments > 1, False)

    def solve(self, heads: int, again: bool, ridges: bool) -> Bound:
        """heads: of the right-hand side. again: another one has been solved for, and the gradient of Lambda is wanted. ridges: one
        a token."""
        key = heads, again, ridges
        if key not in self.solves:  # a Bound is for the same arguments to be None
            constants = {**self.constants, "HQ": heads, "READ_BEFORE": self.kind.before, "RIDGES": ridges}
            grid, warps = (self.blocks, self.kind.sizes.HV), self.kind.options.solve_warps
            self.solves[key] = solve_kernel.bind(grid, warps, **constants)
        return self.solves[key]


class Exact(NamedTuple):
    """All that decides the launch of an exact solve. scaled: H comes divided by sizes. heads: of the right-hand side. log_decay,
    weight: axes, None where there is none."""

    sizes: Sizes
    chunk: int
    scaled: bool
    heads: int
    log_decay: int | None
    decay_dtype: torch.dtype | None
    weight: int | None
    packed: bool
    before: bool
    device: int


@lru_cache(maxsize=1024)
def exact(kind: Exact) -> Bound:
    s = kind.sizes
    constants = {
        "HQ": kind.heads, "H": s.H, "HV": s.HV, "DK": s.dk, "BK": max(16, power_of_two(s.dk)), "C": kind.chunk,
        "GATE": (NO_GATE if kind.log_decay is None else OF_CHANNEL if kind.log_decay in (2, 4) else OF_HEAD).value,
        "WEIGHTED": kind.weight is not None, "READ_BEFORE": kind.before, "PACKED": kind.packed,
    }  # fmt: skip
    return solve_exactly_kernel.bind((s.slots(kind.chunk, kind.packed), s.HV), 8 if s.dk > 64 else 4, **constants)


plan = lru_cache(maxsize=1024)(Plan)
