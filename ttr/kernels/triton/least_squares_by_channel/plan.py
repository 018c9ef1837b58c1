"""Which kernels a call launches, and how: decided once for all calls of its kind."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import configs
from ..buffers import Shapes
from ..launch import Bound
from ..shapes import Sizes, ceil_div, power_of_two, sizes_of
from ..vector_gate.config import NARROWEST
from .join import join_kernel
from .prepare import operands_kernel
from .reverse import gram_reverse_kernel
from .solve import solve_near_kernel
from .solve_far import solve_far_kernel
from .statistics import gram_kernel


class Options(NamedTuple):
    """chunk: tokens solved for at once, and those of `vector_gate`. reach: of `prepare`. tile: columns of H a program of a scan carries.
    finest: of `least_squares.plan`."""

    chunk: int
    reach: float
    tile: int
    prepare_warps: int
    scan_warps: int
    scan_stages: int
    near_warps: int
    far_warps: int
    finest: float


def options(dk: int, dtype: torch.dtype) -> Options:
    """Static. A chunk's factors stay within 2^reach of 1 on either side of H: fp16, the operand in 16 bits, has few powers of two."""
    if dtype == torch.float32:
        warps = 8 if dk > 64 else 4
        return Options(32, 20.0, 64, warps, warps, 1, warps, 8, torch.finfo(dtype).eps)
    if dk > 128:
        return Options(64, 6.0, 64, 8, 8, 1, 8, 8, 2.0**-13)
    return Options(64, 6.0, 64, 8, 4, 2, 4, 8, 2.0**-13)


class Kind(NamedTuple):
    """All that decides the launches of a call. log_decay, weight: axes, None where there is none."""

    sizes: Sizes
    dtype: torch.dtype
    decay_dtype: torch.dtype
    device: int
    log_decay: int
    weight: int | None
    started: bool
    packed: bool
    before: bool
    arch: str
    options: Options


def kind_of(k, v, log_decay, weight, first_H, cu_seqlens, before: bool) -> Kind:
    return Kind(
        sizes_of(k, v, cu_seqlens), k.dtype, log_decay.dtype, k.get_device(), log_decay.ndim, None if weight is None else weight.ndim,
        first_H is not None, cu_seqlens is not None, before, configs.arch_of(k.device), options(k.shape[3], k.dtype),
    )  # fmt: skip


class Plan:
    """The launches of calls of one kind; each is made when it is first asked for."""

    def __init__(self, kind: Kind):
        s, o, wide = kind.sizes, kind.options, kind.dtype == torch.float32
        self.kind, self.operand = kind, torch.float32 if wide else torch.float16
        self.block = max(16 if wide else NARROWEST, power_of_two(s.dk))  # channels, with those that are masked
        self.tile = min(o.tile, self.block)
        self.chunks, self.tiles = s.slots(o.chunk, kind.packed), ceil_div(s.dk, self.tile)
        self.segments = configs.segments(o.chunk, configs.multiprocessors(kind.arch), s.N * s.HV * self.tiles, s.T)
        self.segment_chunks = ceil_div(ceil_div(s.T, o.chunk), self.segments)
        self.weight_stride = s.HV if kind.weight == 3 else 0
        self.numbers: dict[str, Any] = {
            "H": s.H, "HV": s.HV, "DK": s.dk, "BK": self.block, "TILE": self.tile, "C": o.chunk, "WEIGHTED": kind.weight is not None,
            "READ_BEFORE": kind.before, "PACKED": kind.packed, "WIDE": wide, "PER_TOKEN": int(kind.log_decay == 4), "REACH": o.reach,
            "ROUNDS": o.chunk.bit_length(), "OPERAND": tl.float32 if wide else tl.float16, "PRECISION": "tf32x3" if wide else "tf32",
        }  # fmt: skip
        self.bound: dict[tuple, Bound] = {}

    def made(self) -> Shapes:
        """What `prepare` makes, in its order."""
        s, f32 = self.kind.sizes, torch.float32
        keys, numbers, factors = (s.tokens, s.HV, s.dk), (s.tokens, s.HV), (self.chunks, s.HV, s.dk)
        return {
            "writes": (keys, self.operand), "added": (numbers, f32), "gains": (factors, f32), "left": (factors, f32),
            "middles": (factors, f32), "keys": (keys, self.operand), "written": (numbers, f32), "lookers": (keys, self.operand),
            "sums": (keys, torch.float64 if self.kind.dtype == f32 else f32), "far": ((self.chunks, s.HV), torch.int32),
        }  # fmt: skip

    def launch(self, kernel, grid: tuple[int, ...], warps: int, stages: int = 1, *given: bool, **more: Any) -> Bound:
        """Made once for the same arguments: what of them is None, `given` and `more` tell. The kernel takes the numbers it has."""
        key = kernel, given, *more.items()
        if key not in self.bound:
            constants = {n: x for n, x in (self.numbers | more).items() if n in kernel.fn.arg_names}
            self.bound[key] = kernel.bind(grid, warps, stages, **constants)
        return self.bound[key]

    def prepare(self) -> Bound:
        return self.launch(operands_kernel, (self.chunks, self.kind.sizes.HV), self.kind.options.prepare_warps)

    def _scan(self, kernel, segments: int, *given: bool, **more: bool) -> Bound:
        s, o = self.kind.sizes, self.kind.options
        return self.launch(kernel, (self.tiles * s.N * s.HV, segments), o.scan_warps, o.scan_stages, *given, **more)

    def statistics(self, local: bool, plain: bool) -> Bound:
        """plain: whether H is also wanted as it is."""
        if local:
            return self._scan(gram_kernel, self.segments - 1, LOCAL=True, STARTED=False)
        return self._scan(gram_kernel, self.segments, plain, LOCAL=False, STARTED=self.kind.started or self.segments > 1)

    def reverse(self, local: bool, ended: bool) -> Bound:
        """ended: whether the last H has a gradient."""
        if local:
            return self._scan(gram_reverse_kernel, self.segments - 1, LOCAL=True, STARTED=False, FIRST=False)
        started = ended or self.segments > 1
        return self._scan(gram_reverse_kernel, self.segments, LOCAL=False, STARTED=started, FIRST=self.kind.started)

    def join(self, started: bool, backward: bool) -> Bound:
        s = self.kind.sizes
        grid, tile = (ceil_div(s.dk, 16) * s.N * s.HV,), 16  # all in float32
        return self.launch(join_kernel, grid, 4, TILE=tile, STARTED=started, BACKWARD=backward)

    def solve(self, heads: int, again: bool, far: bool, ridges: bool) -> Bound:
        """heads: of the right-hand side. again: another one has been solved for, and the gradient of Lambda is wanted. ridges: one
        a token."""
        kernel, o = solve_far_kernel if far else solve_near_kernel, self.kind.options
        grid = self.chunks, self.kind.sizes.HV
        return self.launch(kernel, grid, o.far_warps if far else o.near_warps, 1, again, HQ=heads, RIDGES=ridges)


plan = lru_cache(maxsize=1024)(Plan)


def segments_of(p: Plan, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what every segment does on its own, for what enters it, [N, segments, Hv, dk, dk], and for its decays."""
    s = p.kind.sizes
    pieces = s.N * p.segments * s.HV
    local, between = (like.new_empty((pieces, s.dk, s.dk), dtype=torch.float32) for _ in range(2))
    return local, between, like.new_empty((pieces, s.dk), dtype=torch.float32)
