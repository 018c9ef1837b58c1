"""Two layers side by side over one input: LaCT's layer, and Titans' MAG."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ...registry import SpecError, composition
from ...stages import Proj
from ..state import ComposedState
from .base import ComposedLayer, Composition, Place
from .gate import ProductGate


@composition("parallel")
@dataclass(frozen=True, kw_only=True)
class Parallel(Composition):
    """o = W_o (y + m) or W_o (y (x) m), m and y what the heads of memory and window make of [P | x].

    share: the streams that are projected once, for both, before their stages. combine: `sum`, or `gate`, the product of
    `ProductGate`. P, the persistent vectors, is what the memory reads first and the window never loses from sight.
    Sources: LaCT (2505.23884), sum and shared q, k, v; Titans (2501.00663), section 4.2, gate and persistent vectors.
    """

    parts = ("memory", "window")

    memory: Any
    window: Any = "softmax_window"
    share: tuple[Literal["q", "k", "v"], ...] = ()
    combine: Literal["sum", "gate"] = "sum"

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.share)) < len(self.share):
            raise SpecError(f"compose.share={list(self.share)} names a stream twice")
        object.__setattr__(self, "share", tuple(sorted(self.share, key="qkv".index)))
        prefix = getattr(self.window.regressor, "prefix", 0)
        if self.persistent and prefix:
            raise SpecError(
                f"compose.window: regressor.prefix={prefix}, but what this window keeps is the {self.persistent} vectors of "
                "compose.persistent; leave prefix out"
            )
        for part in self.parts:
            for name in self.share:
                self._check_shared(part, name)

    def _check_shared(self, part: str, name: str) -> None:
        stages = getattr(getattr(self, part).layer, name) or ()
        if any(isinstance(stage, Proj) for stage in stages):
            raise SpecError(
                f"compose.share: {part}.layer.{name} says how it is projected; a shared stream is one plain matrix of the input, "
                "its stages begin behind it"
            )

    def remembered(self):
        regressor = self.window.regressor
        if getattr(regressor, "window", None) is None:
            return super().remembered()
        return {
            "memory": self.memory,
            "window": replace(self.window, regressor=replace(regressor, prefix=self.persistent or regressor.prefix)),
        }

    def build(self, place: Place) -> ParallelLayer:
        return ParallelLayer(self, place)

    def equations(self):
        x = "[P | x]" if self.persistent else "x"
        shared = f", one projection for both of {', '.join(self.share)}" if self.share else ""
        join = "y + m" if self.combine == "sum" else "n(y) ⊙ silu(n'(m)), n and n' RMS norms"
        return (f"m = memory({x}),  y = window({x})   (their heads{shared})", f"o = Wₒ ({join})")


class ParallelLayer(ComposedLayer):
    spec: Parallel

    def __init__(self, spec: Parallel, place: Place):
        super().__init__(spec, place)
        self.memory = place.mixer(spec.memory, path=place.path, given=("o",))
        self.window = place.mixer(spec.remembered()["window"], given=("o", *spec.share))
        if self.memory.width != self.window.width:
            raise SpecError(
                f"compose.combine={spec.combine!r} joins outputs of one width; memory's heads give {self.memory.width}, "
                f"window's {self.window.width} (layer.expand_v)"
            )
        for name in spec.share:
            widths = [m.projected_width(name) for m in (self.memory, self.window)]
            if widths[0] != widths[1]:
                raise SpecError(f"compose.share: {name} is projected to {widths[0]} channels for memory, to {widths[1]} for window")
        self.gate = ProductGate(self.memory.width) if spec.combine == "gate" else None
        self.o_proj = nn.Linear(self.memory.width, place.d_model, bias=False)
        self.reset_persistent()

    def run(self, x: Tensor, state: ComposedState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ComposedState]:
        parts = self.begin(x, state, cu_seqlens)
        shared = {name: getattr(self.memory, f"{name}_proj")(x) for name in self.spec.share}
        m, memory = self.memory.heads(x, parts["memory"], cu_seqlens, shared)
        y, window = self.window.heads(x, parts["window"], cu_seqlens, shared)
        o = y + m if self.gate is None else self.gate(y, m)
        return self.o_proj(o), self.state({"memory": memory, "window": window})
