"""The launches of one call, forward and backward."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buffers import Layout, Shapes
from ..launch import Bound, prepare
from ..scalar_gate import segments as erased
from ..shapes import Sizes, ceil_div, power_of_two, sizes_of
from .config import Config, saved
from .forward import forward_kernel
from .gradients import gradients_kernel
from .gradients_far import gradients_far_kernel
from .pairs import pairs_kernel
from .prepare import prepare_far_kernel, prepare_kernel
from .reverse import reverse_kernel
from .rounds import ITEMS
from .segments import segments_kernel
from .states import states_kernel
from .values import values_kernel

PREPARED = "queries", "looks", "writes", "added", "errors_of", "reads", "added_reads", "left"  # of every chunk


class Rule(NamedTuple):
    """What of the declaration the kernels know. erase: the delta rule. tied: it writes with weight times the keys it looks
    with. added: the values are written with keys of their own. Who sees a token's decay."""

    erase: bool
    tied: bool
    added: bool
    look_before: bool
    read_before: bool


rule_of = cache(Rule)


class Kind(NamedTuple):
    """All that decides the launches of a call. log_decay, weight: axes, None where there is none."""

    sizes: Sizes
    dtype: torch.dtype
    decay_dtype: torch.dtype
    device: int
    log_decay: int
    weight: int | None
    initial: bool
    packed: bool
    rule: Rule
    config: Config
    segments: int
    room: int  # for how many segments states are kept; 0: no sequence of such a size is cut


class Plan:
    """The launches of calls of one kind. ended: whether the last state has a gradient; learned: whether the log decay wants one."""

    def __init__(self, kind: Kind, save: bool, ended: bool, learned: bool):
        s, config, rule = kind.sizes, kind.config, kind.rule
        self.kind, self.learned, self.save, self.ended = kind, learned, save, ended
        self.segment_chunks = ceil_div(ceil_div(s.T, config.chunk), kind.segments)
        self.chunks = s.slots(config.chunk, kind.packed)
        self.weight_stride = s.HV if kind.weight == 3 else 0
        self.programs = ceil_div(self.chunks * s.HV, ITEMS.value)  # that look for far chunks
        self.key_tile = min(config.gradients.tile, max(16, power_of_two(s.dk)))
        self.key_tiles = ceil_div(s.dk, self.key_tile)
        self.value_tile = min(128 if kind.dtype.itemsize == 2 else 32, max(16, power_of_two(s.dv)))  # of a state, in gradients
        self.kept, self.made = saved(s, kind.dtype, rule.erase, config, kind.room), Layout(self._made())
        self.numbers = {
            "H": s.H, "HV": s.HV, "DK": s.dk, "DV": s.dv, "BK": max(16, power_of_two(s.dk)), "C": config.chunk, "ERASE": rule.erase,
            "ADDED": rule.added, "TIED": rule.tied, "WEIGHTED": kind.weight is not None, "LOOK_BEFORE": rule.look_before,
            "READ_BEFORE": rule.read_before, "PACKED": kind.packed, "WIDE": kind.dtype == torch.float32, "REACH": config.reach,
            "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32", "LEARNED": learned, "ROUNDS": config.chunk.bit_length(),
            "PER_TOKEN": int(kind.log_decay == 4),
        }  # fmt: skip
        self.bound: dict[str, Bound] = {}

    def _made(self) -> Shapes:
        """What `prepare` makes."""
        s, dtype, rule = self.kind.sizes, self.kind.dtype, self.kind.rule
        keys, pairs = ((s.tokens, s.HV, s.dk), dtype), ((s.tokens, s.HV, self.kind.config.chunk), dtype)
        out = {"queries": keys, "writes": keys, "reads": pairs, "left": ((self.chunks, s.HV, s.dk), torch.float32)}
        if rule.erase:
            out["looks"] = keys
        if rule.added:
            out |= {"added": keys, "added_reads": pairs, "errors_of": pairs}
        return out

    def launch(self, name: str, kernel, grid: tuple[int, ...], launch: Any, **more: Any) -> Bound:
        """Made once; the kernel takes those of the numbers that it has a parameter for."""
        if name not in self.bound:
            constants = {n: x for n, x in (self.numbers | more).items() if n in kernel.fn.arg_names}
            self.bound[name] = kernel.bind(grid, launch.warps, launch.stages, **constants)
        return self.bound[name]

    def prepare(self, solved: bool) -> Bound:
        launch = self.kind.config.prepare
        tile = min(launch.tile, self.numbers["BK"])
        name = "prepare solved" if solved else "prepare"
        return self.launch(name, prepare_kernel, (self.chunks, self.kind.sizes.HV), launch, BK=tile, SOLVED=solved)

    def prepare_far(self, solved: bool) -> Bound:
        name = "prepare far solved" if solved else "prepare far"
        return self.launch(name, prepare_far_kernel, (self.programs,), self.kind.config.far, BK=16, SOLVED=solved)

    def scan(self, name: str, kernel, launch: Any, segments: int, units: int = 0, **more: Any) -> Bound:
        """A tile of value channels a program; units: key channels, of which further tiles carry a segment's transfer."""
        s, tile = self.kind.sizes, min(launch.tile, max(16, power_of_two(self.kind.sizes.dv)))
        grid = (ceil_div(s.dv, tile) + ceil_div(units, tile)) * s.N * s.HV, segments
        return self.launch(name, kernel, grid, launch, BV=tile, **more)

    def forward(self, local: bool) -> Bound:
        kind, started = self.kind, self.kind.initial or self.kind.segments > 1
        launch = kind.config.forward
        if not local:
            return self.scan("forward", forward_kernel, launch, kind.segments, LOCAL=False, STARTED=started, SAVE=self.save)
        segments = kind.segments if self.save else kind.segments - 1  # of the last one backward wants the transfer
        units = kind.sizes.dk if kind.rule.erase else 0
        return self.scan("forward local", forward_kernel, launch, segments, units, LOCAL=True, STARTED=False, SAVE=False)

    def states(self) -> Bound:
        started = self.kind.initial or self.kind.segments > 1
        return self.scan("states", states_kernel, self.kind.config.states, self.kind.segments, STARTED=started)

    def reverse(self, local: bool) -> Bound:
        kind, launch = self.kind, self.kind.config.reverse
        if local:
            return self.scan("reverse local", reverse_kernel, launch, kind.segments - 1, LOCAL=True, STARTED=False, FIRST=False)
        started = self.ended or kind.segments > 1
        return self.scan("reverse", reverse_kernel, launch, kind.segments, LOCAL=False, STARTED=started, FIRST=kind.initial)

    def join(self, started: bool, backward: bool) -> Bound:
        s, launch, erase = self.kind.sizes, self.kind.config.segments, self.kind.rule.erase
        kernel = erased.segments_kernel if erase else segments_kernel
        tile = min(launch.tile, max(16, power_of_two(s.dv)))
        name = "join back" if backward else "join"
        return self.launch(name, kernel, (ceil_div(s.dv, tile) * s.N * s.HV,), launch, BV=tile, STARTED=started, BACKWARD=backward)

    def pairs(self) -> Bound:
        launch, s = self.kind.config.pairs, self.kind.sizes
        return self.launch("pairs", pairs_kernel, (self.chunks, s.HV), launch, BV=min(launch.tile, max(16, power_of_two(s.dv))))

    def values(self) -> Bound:
        launch, s = self.kind.config.values, self.kind.sizes
        keys, values = (min(launch.tile, max(16, power_of_two(d))) for d in (s.dk, s.dv))
        return self.launch("values", values_kernel, (self.chunks * ceil_div(s.dv, values), s.HV), launch, BK=keys, BV=values)

    def gradients(self) -> Bound:
        launch, numbers = self.kind.config.gradients, {"BK": self.key_tile, "BV": self.value_tile}
        return self.launch("gradients", gradients_kernel, (self.chunks * self.key_tiles, self.kind.sizes.HV), launch, **numbers)

    def gradients_far(self) -> Bound:
        launch, numbers = self.kind.config.far, {"BK": 16, "TILE": self.key_tile, "BV": self.value_tile}
        return self.launch("gradients far", gradients_far_kernel, (self.programs, self.key_tiles), launch, **numbers)


plan_of = lru_cache(maxsize=1024)(Plan)


def kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule: Rule, config: Config, segments: int, room: int | None) -> Kind:
    """room: as many as segments if None."""
    room = (segments if segments > 1 else 0) if room is None else room
    weight_axes = None if weight is None else weight.ndim
    return Kind(
        sizes_of(q, v, cu_seqlens), q.dtype, log_decay.dtype, q.get_device(), log_decay.ndim, weight_axes, initial is not None,
        cu_seqlens is not None, rule, config, segments, room,
    )  # fmt: skip


def forward(
    q, k, v, w, p, log_decay, weight, initial, cu_seqlens,
    scale: float, rule: Rule, config: Config, segments: int, save: bool, room: int | None = None,
):  # fmt: skip
    """o, the last state and what backward needs (`saved`), or without save an empty tensor. room: of `kind_of`."""
    if q.is_cuda:
        prepare()
    plan = plan_of(kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments, room), save, False, False)
    s = plan.kind.sizes
    buffer, scratch = plan.kept.make(q), plan.made.make(q)
    kept, made = plan.kept.arrays(buffer), plan.made.arrays(scratch)
    o, last = torch.empty_like(v), q.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    inverse = kept.get("inverse")
    _prepare(plan, q, k, w, p, log_decay, weight, inverse, made, cu_seqlens, scale, False)
    queries, looks, writes, added, errors_of, reads, added_reads, left = (made.get(name) for name in PREPARED)
    if not rule.added:
        errors_of = inverse
    inputs = queries, looks, writes, added, errors_of, reads, added_reads, left, v
    scanned = cu_seqlens, s.T, segments, plan.segment_chunks
    start = initial
    if segments > 1:
        start, transfer, local = kept["starts"], kept["transfer"], q.new_empty((s.N * segments * s.HV, s.dk, s.dv), dtype=torch.float32)
        plan.forward(True)(*inputs, None, None, None, local, transfer, *scanned)
        plan.join(initial is not None, False)(initial, local, transfer, start, segments)
    plan.forward(False)(*inputs, start, o, kept.get("error") if save else None, last, None, *scanned)
    return o, last, buffer if save else q.new_empty((0,), dtype=torch.uint8)


def _prepare(plan: Plan, q, k, w, p, log_decay, weight, inverse, made: dict[str, Any], cu_seqlens, scale: float, solved: bool) -> Tensor:
    """Returns which chunks are far, [chunks, Hv]."""
    queries, looks, writes, added, errors_of, reads, added_reads, left = (made.get(name) for name in PREPARED)
    s = plan.kind.sizes
    far = q.new_empty((plan.chunks, s.HV), dtype=torch.int32)
    given = q, k, w, p, log_decay, weight, inverse
    arrays = queries, looks, writes, added, reads, added_reads, errors_of, left, far, cu_seqlens
    plan.prepare(solved)(*given, *arrays, s.N, s.T, scale, plan.weight_stride)
    plan.prepare_far(solved)(*given, *arrays, s.N, s.T, plan.chunks * s.HV, scale, plan.weight_stride)
    return far


def backward(
    do, dlast, q, k, v, w, p, log_decay, weight, initial, cu_seqlens, buffer: Tensor,
    scale: float, rule: Rule, config: Config, segments: int, learned: bool = True, room: int | None = None,
):  # fmt: skip
    """dq, dk, dv, dw, dp, dlog_decay, dweight, dinitial; None for what was not given. learned: whether dlog_decay is wanted."""
    if q.is_cuda:
        prepare()
    kind = kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments, room)
    plan = plan_of(kind, True, dlast is not None, learned)
    s, empty = kind.sizes, q.new_empty
    kept, scratch = plan.kept.arrays(buffer), plan.made.make(q)
    made = plan.made.arrays(scratch)
    inverse, error = kept.get("inverse"), kept.get("error", v)
    far = _prepare(plan, q, k, w, p, log_decay, weight, inverse, made, cu_seqlens, scale, True)
    queries, looks, writes, added, errors_of, reads, added_reads, left = (made.get(name) for name in PREPARED)
    scanned = cu_seqlens, plan.chunks * s.HV, s.T, segments, plan.segment_chunks
    start = kept["starts"] if segments > 1 else initial
    states, gradients = (empty((plan.chunks, s.HV, s.dk, s.dv)) for _ in range(2))
    plan.states()(writes, added, left, error, v, start, states, *scanned)

    dv = torch.empty_like(v)
    derror = torch.empty_like(v) if rule.added else dv
    first = None if initial is None else torch.empty_like(initial)
    inputs = queries, looks, writes, inverse, reads, left, do
    end = dlast
    if segments > 1:
        local, end = (empty((s.N * segments * s.HV, s.dk, s.dv), dtype=torch.float32) for _ in range(2))
        plan.reverse(True)(*inputs, None, None, None, local, *scanned)
        plan.join(dlast is not None, True)(dlast, local, kept["transfer"], end, segments)
        del local
    plan.reverse(False)(*inputs, end, derror, gradients, first, *scanned)
    if rule.added:
        plan.values()(added, added_reads, errors_of, gradients, do, derror, dv, cu_seqlens, s.N, s.T)
    del scratch, made, inputs, queries, looks, writes, added, errors_of, reads, added_reads, left, end

    pair_shape = s.tokens, s.HV, config.chunk
    reads = empty(pair_shape)
    looks = empty(pair_shape) if rule.erase else None
    added_reads, added_looks = (empty(pair_shape) if rule.added else None for _ in range(2))
    plan.pairs()(error, v, do, derror, reads, looks, added_reads, added_looks, cu_seqlens, s.N, s.T, scale)
    per_head = (*q.shape[:2], s.HV, s.dk)
    dq = empty(per_head)
    dk = empty(per_head) if rule.tied or rule.erase else None
    dw = None if rule.tied else empty(per_head)
    dp = empty(per_head) if rule.added else None
    dlog_decay = empty(per_head, dtype=log_decay.dtype) if learned else None
    dweight = None if weight is None else empty((plan.key_tiles, *q.shape[:2], s.HV), dtype=torch.float32)
    given = q, k, w, p, log_decay, weight, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, far
    wanted = dq, dk, dw, dp, dlog_decay, dweight
    plan.gradients()(*given, *wanted, cu_seqlens, s.N, s.T, s.tokens, scale, plan.weight_stride)
    plan.gradients_far()(*given, *wanted, cu_seqlens, s.N, s.T, s.tokens, plan.chunks * s.HV, scale, plan.weight_stride)
    if dweight is not None:
        dweight = dweight.sum(0) if plan.key_tiles > 1 else dweight[0]
    if s.HV != s.H:
        dq, dk, dp = (None if x is None else x.unflatten(2, (s.H, -1)).sum(3) for x in (dq, dk, dp))
    return dq, dk, dv, dw, dp, dlog_decay, dweight, first
