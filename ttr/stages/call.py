"""Call: what a stage may see of the layer's current call besides its own stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .timeline import Timeline


@dataclass
class Call:
    """One pass of a layer over its input.

    x: [B, T, d_model], the layer's input. previous: [B, T, d_model], the input one token earlier, where a stage or a
    signal mixes it in. timeline: which token follows which. position: [B, T], tokens read before, or None.
    streams: q [B, T, H, dk], k [B, T, n H, dk], v [B, T, n Hv, dv], write_key, as far as they are finished.
    signals: values by name, as far as they are known. late: instead of their values what makes output gates of the call, where they
    are used: backward is then through with them when it comes to the memory, which takes the most. history, kept: what stages
    remember, by StreamSize.key.
    """

    x: Tensor
    timeline: Timeline
    previous: Tensor | None = None
    position: Tensor | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)
    late: dict[str, Callable[[Call], Tensor]] = field(default_factory=dict)
    history: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def before(self, key: str, x: Tensor) -> Tensor:
        """x: [B, T, C] one token earlier; what the next call needs of x is kept under `key`."""
        (_, previous), self.kept[key] = self.timeline.lags(x, 1, self.history.get(key))
        return previous

    def convolve(self, key: str, x: Tensor, weight: Tensor, silu: bool = False) -> Tensor:
        """x: [B, T, C] filtered over time, channel by channel, with weight: [C, K], newest input last; silu: SiLU of that."""
        y, self.kept[key] = self.timeline.convolve(x, weight, self.history.get(key), silu)
        return y
