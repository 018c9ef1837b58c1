"""Which kernels a call launches, and how: decided once for all calls of its kind."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from ..buffers import Layout, Shapes
from ..launch import Bound
from ..scalar_gate import segments as erased
from ..shapes import Sizes, ceil_div, power_of_two, sizes_of
from .config import NARROWEST, Config, between, rows, saved
from .forward import forward_kernel
from .gradients import gradients_kernel
from .gradients_far import gradients_far_kernel
from .pairs import pairs_kernel
from .prepare import prepare_kernel
from .prepare_far import prepare_far_kernel
from .reverse import reverse_kernel
from .rounds import ITEMS
from .rows import rows_kernel
from .segments import segments_kernel
from .states import states_kernel
from .values import values_kernel


class Rule(NamedTuple):
    """What of the declaration the kernels know. erase: the delta rule. added: the values are written with keys of their own.
    Who looks and reads before a token's decay."""

    erase: bool
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
        self.least = NARROWEST if kind.dtype.itemsize == 2 else 16  # channels of a tile
        self.key_tile = self.tile(config.gradients.tile, s.dk)
        self.key_tiles = ceil_div(s.dk, self.key_tile)
        self.value_tile = self.tile(NARROWEST if kind.dtype.itemsize == 2 else 32, s.dv)  # of a state, in gradients
        self.kept = saved(s, kind.dtype, rule.erase, rule.added, config, kind.room, kind.packed, save)
        self.numbers = {
            "H": s.H, "HV": s.HV, "DK": s.dk, "DV": s.dv, "BK": self.tile(power_of_two(s.dk), s.dk), "C": config.chunk, "ERASE": rule.erase,
            "ADDED": rule.added, "WEIGHTED": kind.weight is not None, "BY_CHANNEL": kind.weight == 4, "LOOK_BEFORE": rule.look_before,
            "READ_BEFORE": rule.read_before, "PACKED": kind.packed, "WIDE": kind.dtype == torch.float32, "REACH": config.reach,
            "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32", "LEARNED": learned, "ROUNDS": config.chunk.bit_length(),
            "PER_TOKEN": int(kind.log_decay == 4),
        }  # fmt: skip
        self.bound: dict[str, Bound] = {}

    @cached_property
    def made(self) -> Layout:
        """What forward makes beside what is kept."""
        s, dtype, rule = self.kind.sizes, self.kind.dtype, self.kind.rule
        return self.beside({**rows(s, dtype, rule.erase, rule.added), **between(s, dtype, rule.added, self.kind.config, self.kind.packed)})

    @cached_property
    def again(self) -> Layout:
        """What backward makes again."""
        return self.beside(rows(self.kind.sizes, self.kind.dtype, self.kind.rule.erase, self.kind.rule.added))

    def beside(self, shapes: Shapes) -> Layout:
        """Those of them that are not kept."""
        return Layout({name: x for name, x in shapes.items() if name not in self.kept.places})

    def tile(self, most: int, channels: int) -> int:
        """What a head has of channels in tiles of so many at most; those it does not have are masked."""
        return max(self.least, min(most, power_of_two(channels)))

    def launch(self, name: str, kernel, grid: tuple[int, ...], launch: Any, **more: Any) -> Bound:
        """Made once; the kernel takes those of the numbers that it has a parameter for."""
        if name not in self.bound:
            constants = {n: x for n, x in (self.numbers | more).items() if n in kernel.fn.arg_names}
            self.bound[name] = kernel.bind(grid, launch.warps, launch.stages, **constants)
        return self.bound[name]

    def prepare(self) -> Bound:
        launch, s = self.kind.config.prepare, self.kind.sizes
        return self.launch("prepare", prepare_kernel, (self.chunks, s.HV), launch, BK=self.tile(launch.tile, s.dk))

    def prepare_far(self) -> Bound:
        launch = self.kind.config.far
        return self.launch("prepare far", prepare_far_kernel, (self.programs,), launch, BK=self.tile(launch.tile, self.kind.sizes.dk))

    def rows(self) -> Bound:
        launch, s = self.kind.config.rows, self.kind.sizes
        tile = self.tile(launch.tile, s.dk)
        return self.launch("rows", rows_kernel, (self.chunks * ceil_div(s.dk, tile), s.HV), launch, BK=tile)

    def scan(self, name: str, kernel, launch: Any, segments: int, units: int = 0, **more: Any) -> Bound:
        """A tile of value channels a program; units: key channels, of which further tiles carry a segment's transfer."""
        s, tile = self.kind.sizes, self.tile(launch.tile, self.kind.sizes.dv)
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
        tile = min(launch.tile, power_of_two(s.dv))  # all in float32
        name = "join back" if backward else "join"
        return self.launch(name, kernel, (ceil_div(s.dv, tile) * s.N * s.HV,), launch, BV=tile, STARTED=started, BACKWARD=backward)

    def pairs(self) -> Bound:
        launch, s = self.kind.config.pairs, self.kind.sizes
        return self.launch("pairs", pairs_kernel, (self.chunks, s.HV), launch, BV=self.tile(launch.tile, s.dv))

    def values(self) -> Bound:
        launch, s = self.kind.config.values, self.kind.sizes
        keys, values = (self.tile(launch.tile, d) for d in (s.dk, s.dv))
        return self.launch("values", values_kernel, (self.chunks * ceil_div(s.dv, values), s.HV), launch, BK=keys, BV=values)

    def gradients(self, values_decay: bool = False) -> Bound:
        name = "gradients, values decay" if values_decay else "gradients"
        launch, numbers = self.kind.config.gradients, {"BK": self.key_tile, "BV": self.value_tile}
        return self.launch(name, gradients_kernel, (self.chunks * self.key_tiles, self.kind.sizes.HV), launch, **numbers)

    def gradients_far(self, values_decay: bool = False) -> Bound:
        name = "gradients far, values decay" if values_decay else "gradients far"
        launch = self.kind.config.far
        numbers = {"BK": self.tile(launch.tile, self.key_tile), "TILE": self.key_tile, "BV": self.tile(launch.tile, self.kind.sizes.dv)}
        return self.launch(name, gradients_far_kernel, (self.programs, self.key_tiles), launch, **numbers)


plan_of = lru_cache(maxsize=1024)(Plan)


def kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule: Rule, config: Config, segments: int, room: int | None) -> Kind:
    """room: as many as segments if None."""
    room = (segments if segments > 1 else 0) if room is None else room
    weight_axes = None if weight is None else weight.ndim
    return Kind(
        sizes_of(q, v, cu_seqlens), q.dtype, log_decay.dtype, q.get_device(), log_decay.ndim, weight_axes, initial is not None,
        cu_seqlens is not None, rule, config, segments, room,
    )  # fmt: skip
