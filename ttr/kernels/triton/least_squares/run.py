"""The launches of one call, forward and backward."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import configs
from ..launch import Bound, prepare
from ..scalar_gate import run as scalar_gate
from ..scalar_gate.decays import cumulate_kernel
from ..scalar_gate.plan import Rule
from ..scalar_gate.segments import segments_kernel
from ..shapes import Sizes, ceil_div, power_of_two, sizes_of
from .solve import solve_kernel
from .statistics import statistics_kernel


class Form(NamedTuple):
    """iterations, tolerance: of `cg`. before: reads stand before the token's own pair."""

    scale: float
    iterations: int
    tolerance: float
    before: bool


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


def kind_of(k, v, log_decay, weight, first_H, cu_seqlens, before: bool, chosen: Options | None) -> Kind:
    log_decay_axes, weight_axes = (None if x is None else x.ndim for x in (log_decay, weight))
    return Kind(
        sizes_of(k, v, cu_seqlens), k.dtype, k.get_device(), log_decay_axes, weight_axes, first_H is not None, cu_seqlens is not None,
        before, configs.arch_of(k.device), chosen or options(k.shape[3], k.dtype),
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
        constants = {"HV": s.HV, "BH": heads, "C": kind.options.chunk, "ERASE": False, "WIDE": kind.dtype == torch.float32}
        return cumulate_kernel.bind((self.blocks, ceil_div(s.HV, heads)), 4, **constants, PACKED=kind.packed)

    def scan(self, started: bool, local: bool) -> Bound:
        s, o = self.kind.sizes, self.kind.options
        grid = self.tiles * s.N * s.HV, self.segments - 1 if local else self.segments
        return statistics_kernel.bind(
            grid, o.scan_warps, o.scan_stages, **self.constants, TILE=o.tile, STARTED=started, LOCAL=local
        )  # fmt: skip

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

    def solve(self, heads: int) -> Bound:
        """heads: of the right-hand side."""
        return self.solves[heads]

    @cached_property
    def solves(self) -> dict[int, Bound]:
        s, kind = self.kind.sizes, self.kind
        return {
            heads: solve_kernel.bind(
                (self.blocks, s.HV), kind.options.solve_warps, **self.constants, HQ=heads, READ_BEFORE=kind.before
            )
            for heads in {s.H, s.HV}
        }  # fmt: skip


plan = lru_cache(maxsize=1024)(Plan)


class Statistics(NamedTuple):
    """H before every chunk as the solve takes it, and the chunks' decays."""

    states: Tensor
    sizes: Tensor
    decays: Tensor | None


def statistics(p: Plan, k, log_decay, weight, first_H, cu_seqlens) -> tuple[Statistics, Tensor]:
    """And H behind the last token, [N, Hv, dk, dk]."""
    s, empty = p.kind.sizes, k.new_empty
    decays = bounds = None
    if p.gated:
        decays, bounds = empty((s.tokens, s.HV), dtype=p.decays_dtype), empty((p.blocks, s.HV), dtype=torch.float32)
        p.cumulate(log_decay, decays, bounds, cu_seqlens, s.N, s.T, p.decay_stride)
    states, sizes = empty((p.blocks * s.HV, s.dk, s.dk), dtype=p.operand), empty((p.blocks, s.HV), dtype=torch.float32)
    last = empty((s.N, s.HV, s.dk, s.dk), dtype=torch.float32)
    rest = cu_seqlens, p.blocks, s.T, p.segments, p.segment_chunks, p.weight_stride
    start = first_H
    if p.segments > 1:
        pieces = s.N * p.segments * s.HV
        local, start = (empty((pieces, s.dk, s.dk), dtype=torch.float32) for _ in range(2))
        transfer = empty((pieces,), dtype=torch.float32)
        p.local(k, decays, bounds, weight, None, states, sizes, local, transfer, *rest)
        p.joined(first_H, local, transfer, start, p.segments)
    p.whole(k, decays, bounds, weight, start, states, sizes, last, None, *rest)
    return Statistics(states, sizes, decays), last


def solve(p: Plan, given: Statistics, q, k, weight, ridge, other, cu_seqlens, form: Form, scale: float) -> tuple[Tensor, Tensor | None]:
    """x [B, T, Hv, dk], and with another right-hand side's solution -sum_t x_t other_t, [Hv, dk]."""
    s = p.kind.sizes
    x = k.new_empty((*k.shape[:2], s.HV, s.dk))
    dridge = None if other is None else k.new_empty((p.blocks, s.HV, s.dk), dtype=torch.float32)
    tolerance = max(form.tolerance, p.kind.options.finest)
    p.solve(q.shape[2])(
        q, k, given.states, given.sizes, given.decays, weight, ridge, x, other, dridge, cu_seqlens,
        s.N, s.T, p.blocks, scale, form.iterations, tolerance, p.weight_stride,
    )  # fmt: skip
    return x, None if dridge is None else dridge.sum(0)


def for_each_memory(k: Tensor, HV: int) -> Tensor:
    """k of a head for every value head that shares it."""
    return k if k.shape[2] == HV else k.repeat_interleave(HV // k.shape[2], 2)


def choose(k: Tensor, width: int, HV: int, cu_seqlens: Tensor | None) -> configs.Choice:
    """How `scalar_gate` runs values of `width` channels."""
    n = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return configs.choose(configs.arch_of(k.device), False, k.shape[3], width, k.dtype, n * HV, k.shape[1])


def forward(
    q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, form: Form, save: bool, learned: bool, chosen: Options | None = None
):
    """o, the last G and H, x, and what backward wants of `scalar_gate`."""
    if q.is_cuda:
        prepare()
    p = plan(kind_of(k, v, log_decay, weight, first_H, cu_seqlens, form.before, chosen))
    given, last_H = statistics(p, k, log_decay, weight, first_H, cu_seqlens)
    x, _ = solve(p, given, q, k, weight, ridge, None, cu_seqlens, form, form.scale)
    del given
    HV, dv = v.shape[2:]
    config, segments, room = choose(k, dv, HV, cu_seqlens)
    rule, k = Rule(False, False, form.before), for_each_memory(k, HV)
    o, last_G, saved = scalar_gate.forward(
        x, k, v, log_decay, weight, first_G, cu_seqlens, 1.0, rule, config, segments, save, learned, room
    )
    return o, last_G, last_H, x, saved


def backward(
    do,
    dlast_G,
    dlast_H,
    q,
    k,
    v,
    log_decay,
    weight,
    ridge,
    first_G,
    first_H,
    cu_seqlens,
    x,
    saved,
    form: Form,
    learned: bool,
    chosen: Options | None = None,
):
    """dq, dk, dv, dlog_decay, dweight, dridge, and of the first G and H; None for what was not given."""
    if q.is_cuda:
        prepare()
    H, (HV, dv), rule = k.shape[2], v.shape[2:], Rule(False, False, form.before)
    keys = for_each_memory(k, HV)
    config, segments, room = choose(k, dv, HV, cu_seqlens)
    dx, dkeys, dv_, dlog_decay, dweight, dfirst_G = scalar_gate.backward(
        do, dlast_G, x, keys, v, log_decay, weight, first_G, cu_seqlens, saved, 1.0, rule, config, segments, learned, room
    )

    p = plan(kind_of(k, v, log_decay, weight, first_H, cu_seqlens, form.before, chosen))
    given, _ = statistics(p, k, log_decay, weight, first_H, cu_seqlens)
    dq, dridge = solve(p, given, dx, k, weight, ridge, x, cu_seqlens, form, 1.0)
    del given, dx

    # dH_t = -dq_t x_t^T: as if values k had been read with x, and -dq came back
    config, segments, room = choose(k, keys.shape[3], HV, cu_seqlens)
    inputs = x, keys, keys, log_decay, weight, first_H, cu_seqlens
    _, _, saved = scalar_gate.forward(*inputs, -1.0, rule, config, segments, True, learned, room)
    _, by_key, by_value, by_decay, by_weight, dfirst_H = scalar_gate.backward(
        dq, dlast_H, *inputs, saved, -1.0, rule, config, segments, learned, room
    )
    dkeys += by_key
    dkeys += by_value
    dlog_decay, dweight = (None if a is None else a + b for a, b in ((dlog_decay, by_decay), (dweight, by_weight)))
    if form.scale != 1.0:
        dq *= form.scale
    if HV != H:
        dq, dkeys = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dkeys))
    return dq, dkeys, dv_, dlog_decay, dweight, dridge, dfirst_G, dfirst_H
