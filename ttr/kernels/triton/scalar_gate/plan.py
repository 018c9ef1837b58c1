"""Which kernels a call launches, and how: decided once for all calls of its kind."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from ..buffers import Layout, Shapes
from ..configs import Config, suited
from ..launch import Bound
from ..shapes import Sizes, ceil_div, power_of_two, saved, sizes_of
from .decays import carried_kernel, cumulate_kernel, decay_gradient_kernel
from .forward import forward_kernel
from .inverse import inverse_kernel
from .keys import keys_kernel
from .pairs import pairs_kernel
from .readers import readers_kernel
from .reverse import reverse_kernel
from .segments import segments_kernel
from .weigh import weigh_kernel


class Rule(NamedTuple):
    """What of the declaration the kernels know: the delta rule (erase) or the inner product, and who sees a token's decay."""

    erase: bool
    look_before: bool
    read_before: bool


rule_of = cache(Rule)


class Kind(NamedTuple):
    """All that decides the launches of a call. log_decay, weight: axes, None where there is none."""

    sizes: Sizes
    dtype: torch.dtype
    device: int
    log_decay: int | None
    weight: int | None
    initial: bool
    packed: bool
    rule: Rule
    config: Config
    segments: int
    room: int  # for how many segments states are kept; 0: no sequence of such a size is cut


def kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule: Rule, config: Config, segments: int, room: int | None) -> Kind:
    """room: as many as segments if None."""
    if room is None:
        room = segments if segments > 1 else 0
    log_decay_axes, weight_axes = (None if x is None else x.ndim for x in (log_decay, weight))
    return Kind(
        sizes_of(q, v, cu_seqlens), q.dtype, q.get_device(), log_decay_axes, weight_axes, initial is not None, cu_seqlens is not None,
        rule, suited(config, rule.look_before or rule.read_before), segments, room,
    )  # fmt: skip


CHUNK = ("C", "R", "STEPS")
RULE = ("GATED", "WEIGHTED", "LOOK_BEFORE", "READ_BEFORE", "PACKED", "PRECISION")


class Plan:
    """The launches of calls of one kind; each is made when it is first asked for.

    save: whether there is a backward pass. learned: whether the log decay wants a gradient.
    """

    def __init__(self, kind: Kind, save: bool, learned: bool):
        s, self.kind, self.config, self.learned = kind.sizes, kind, kind.config, learned and kind.log_decay is not None
        self.erase, self.gated = kind.rule.erase, kind.log_decay is not None
        self.dk, self.dv = (max(16, power_of_two(d)) for d in (s.dk, s.dv))
        self.segment_chunks = ceil_div(ceil_div(s.T * s.steps, self.config.chunk), kind.segments)
        self.decay_stride, self.weight_stride = (s.HV if axes in (3, 4) else 0 for axes in (kind.log_decay, kind.weight))
        self.chunks, self.blocks = (s.slots(self.config.chunk * n, kind.packed) for n in (1, self.config.every))
        # of tokens that read in a chunk; the smallest a product takes is 16
        self.rows = self.config.chunk if s.steps == 1 else max(16, power_of_two(ceil_div(self.config.chunk, s.steps)))
        self.few_heads = min(16, power_of_two(s.HV))
        # a weight below it cannot be divided out again
        self.least_weight = 2.0**-14 if kind.dtype == torch.float16 else 1e-30
        self.reader_tiles, self.writer_tiles = (ceil_div(s.dk, launch.tile) for launch in (self.config.readers, self.config.keys))
        self.kept = saved(
            s, kind.dtype, self.config, kind.room, erase=self.erase, gated=self.gated, learned=learned, packed=kind.packed, save=save
        )
        self.hidden = (kind.rule.read_before and s.steps == 1) or (self.erase and kind.rule.look_before)

    def constants(self, *names: str, **more: Any) -> dict[str, Any]:
        """The tl.constexpr parameters that several kernels have, those of them that are named, and more."""
        kind, s = self.kind, self.kind.sizes
        known = {
            "H": s.H, "HV": s.HV, "DK": s.dk, "DV": s.dv, "BK": self.dk, "BV": self.dv, "C": self.config.chunk,
            "R": self.rows, "STEPS": s.steps, "EVERY": self.config.every,
            "ERASE": self.erase, "GATED": self.gated, "WEIGHTED": kind.weight is not None, "LOOK_BEFORE": kind.rule.look_before,
            "READ_BEFORE": kind.rule.read_before, "PACKED": kind.packed, "BH": self.few_heads, "LEAST_WEIGHT": self.least_weight,
            "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        return {name: known[name] for name in names} | more

    def scan(self, kernel, width: int, field: str, segments: int, *names: str, **more: Any) -> Bound:
        """A kernel that goes over chunks, a tile of `width` channels a program."""
        launch, s = getattr(self.config, field), self.kind.sizes
        grid = ceil_div(width, launch.tile) * s.N * s.HV, segments
        constants = self.constants("H", "HV", "DK", "DV", "BK", "BV", *CHUNK, "ERASE", *RULE, *names)
        return kernel.bind(grid, launch.warps, launch.stages, **constants | more)

    @cached_property
    def cumulate(self) -> Bound:
        grid = self.chunks, ceil_div(self.kind.sizes.HV, self.few_heads)
        return cumulate_kernel.bind(
            grid, 4, **self.constants("HV", "BH", "C", "STEPS", "ERASE", "PACKED", WIDE=self.kind.dtype == torch.float32)
        )

    @cached_property
    def inverse(self) -> Bound:
        launch, names = self.config.inverse, ("H", "HV", "DK", "BK", *CHUNK, *RULE)
        return inverse_kernel.bind((self.chunks, self.kind.sizes.H), launch.warps, launch.stages, **self.constants(*names))

    def join(self, started: bool, backward: bool) -> Bound:
        s, launch = self.kind.sizes, self.config.segments
        constants = self.constants("HV", "DK", "DV", "BK", "ERASE", BV=launch.tile, STARTED=started, BACKWARD=backward)
        return segments_kernel.bind((ceil_div(s.dv, launch.tile) * s.N * s.HV,), launch.warps, launch.stages, **constants)


class Forward(Plan):
    """With save it keeps what the backward pass wants, the transfer of the last segment among it."""

    def __init__(self, kind: Kind, save: bool, learned: bool):
        super().__init__(kind, save, learned)
        self.save = save

    def pass_over(self, started: bool, local: bool) -> Bound:
        s, save, field = self.kind.sizes, self.save and not local, "local" if local else "forward"
        tile = getattr(self.config, field).tile
        width = ceil_div(s.dv, tile) * tile + (s.dk if local and self.erase else 0)
        segments = self.kind.segments - 1 if local and not self.save else self.kind.segments
        more = {"STARTED": started, "LOCAL": local, "SAVE": save, "CHECKPOINT": save and self.learned, "BV": tile}
        return self.scan(forward_kernel, width, field, segments, "EVERY", **more)

    @cached_property
    def local(self) -> Bound:
        return self.pass_over(False, True)

    @cached_property
    def joined(self) -> Bound:
        return self.join(self.kind.initial, False)

    @cached_property
    def whole(self) -> Bound:
        return self.pass_over(self.kind.initial or self.kind.segments > 1, False)


class Backward(Plan):
    """ended: whether the last state has a gradient."""

    def __init__(self, kind: Kind, ended: bool, learned: bool):
        super().__init__(kind, True, learned)
        self.ended = ended
        self.cut = kind.segments > 1
        # without ERASE weights are part of what is written (`weigh`)
        self.weighted = {} if self.erase else {"WEIGHTED": False}
        self.work = Layout(self._work())

    def _work(self) -> Shapes:
        s, dtype = self.kind.sizes, self.kind.dtype
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.erase:
            out["read_pairs"] = (s.tokens, s.HV, self.config.chunk), dtype
            out["look_pairs"] = (s.events, s.HV, self.config.chunk), dtype
        if self.learned:  # partial sums per tile of key channels
            out["given"] = out["leaving"] = (self.writer_tiles, s.events, s.HV), torch.float32
            out["carried"] = (self.blocks, s.HV), torch.float32
            if self.erase or s.steps == 1:
                out["taken"] = (self.reader_tiles, s.events, s.HV), torch.float32
            if s.steps > 1:
                out["asked"] = (self.reader_tiles, s.tokens, s.HV), torch.float32
            if self.hidden:
                out["unseen"] = out["taken"]
        return out

    def pass_over(self, started: bool, local: bool) -> Bound:
        segments = self.kind.segments - 1 if local else self.kind.segments
        more = {"STARTED": started, "LEARNED": self.learned, "LOCAL": local, "FIRST": self.kind.initial, "BV": self.config.reverse.tile}
        return self.scan(reverse_kernel, self.kind.sizes.dv, "reverse", segments, "EVERY", "LEAST_WEIGHT", **more, **self.weighted)

    @cached_property
    def local(self) -> Bound:
        return self.pass_over(False, True)

    @cached_property
    def joined(self) -> Bound:
        return self.join(self.ended, True)

    @cached_property
    def whole(self) -> Bound:
        return self.pass_over(self.ended or self.cut, False)

    @cached_property
    def pairs(self) -> Bound:
        launch, names = self.config.pairs, ("HV", "DV", "BV", *CHUNK, "LEAST_WEIGHT", *RULE)
        warps = launch.warps if self.kind.sizes.steps == 1 else max(1, launch.warps // 2)  # fewer rows read
        return pairs_kernel.bind((self.chunks, self.kind.sizes.HV), warps, launch.stages, **self.constants(*names))

    @cached_property
    def weigh(self) -> Bound:
        s, rows = self.kind.sizes, 32
        return weigh_kernel.bind((ceil_div(s.events, rows), s.HV), 4, **self.constants("HV", "DV", "BV", ROWS=rows))

    @cached_property
    def readers(self) -> Bound:
        return self.keyed(readers_kernel, "readers", self.kind.initial or self.cut)

    @cached_property
    def keys(self) -> Bound:
        return self.keyed(keys_kernel, "keys", self.ended or self.cut)

    def keyed(self, kernel, field: str, started: bool) -> Bound:
        launch = getattr(self.config, field)
        more = {"BK": launch.tile, "STARTED": started, "LEARNED": self.learned, "STAGES": launch.stages if self.erase else None}
        return self.scan(kernel, self.kind.sizes.dk, field, self.kind.segments, **more, **self.weighted)

    @cached_property
    def carried(self) -> Bound:
        constants = self.constants("HV", "DK", "DV", "BK", "C", "STEPS", "EVERY", "PACKED", BV=min(self.dv, 64))
        return carried_kernel.bind((self.blocks, self.kind.sizes.HV), 4, **constants)

    @cached_property
    def decay_gradient(self) -> Bound:
        constants = self.constants(
            "HV", "BH", "C", "STEPS", "EVERY", "ERASE", "READ_BEFORE", "PACKED", READERS=self.reader_tiles, WRITERS=self.writer_tiles
        )
        constants |= {"STARTED": self.kind.initial, "UNSEEN": self.hidden}
        return decay_gradient_kernel.bind((self.blocks, ceil_div(self.kind.sizes.HV, self.few_heads)), 4, **constants)


# tensors of every length are a kind of their own
forward_plan = lru_cache(maxsize=1024)(Forward)
backward_plan = lru_cache(maxsize=1024)(Backward)
