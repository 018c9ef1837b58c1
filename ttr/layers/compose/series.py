"""One layer behind the other: Titans' MAL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...registry import composition
from ..state import ComposedState
from .base import ComposedLayer, Composition, Place


@composition("series")
@dataclass(frozen=True, kw_only=True)
class Series(Composition):
    """y = memory([P | x]), o = window(y), both whole layers: what the memory makes of P are tokens to the window.

    The window passes them as it passes any token; its `prefix` keeps the first ones in sight.
    Source: Titans (2501.00663), section 4.3.
    """

    parts = ("memory", "window")

    memory: Any
    window: Any = "softmax_window"

    def build(self, place: Place) -> SeriesLayer:
        return SeriesLayer(self, place)

    def equations(self):
        return (f"y = memory({'[P | x]' if self.persistent else 'x'})", "o = window(y)")


class SeriesLayer(ComposedLayer):
    def __init__(self, spec: Series, place: Place):
        super().__init__(spec, place)
        self.memory = place.mixer(spec.memory, path=place.path)
        self.window = place.mixer(spec.window)
        self.reset_persistent()

    @property
    def o_proj(self) -> nn.Linear:  # type: ignore[override]
        return self.window.o_proj

    def run(self, x: Tensor, state: ComposedState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ComposedState]:
        parts = self.begin(x, state, cu_seqlens)
        y, memory = self.memory.run(x, parts["memory"], cu_seqlens)
        o, window = self.window.run(y, parts["window"], cu_seqlens)
        return o, self.state({"memory": memory, "window": window})
