"""Rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..registry import SpecError, stage
from .base import Stage, StageModule


@stage("rope")
@dataclass(frozen=True, kw_only=True)
class Rope(Stage):
    """Rotate the channel pairs (x_i, x_{i + d/2}) by position * theta^(-2 i / d).

    modulo: positions count from 0 again after so many tokens, or after every mini-batch (TTT). Source: 2104.09864.
    """

    theta: float = 10000.0
    modulo: int | Literal["mini_batch"] | None = None

    def __post_init__(self):
        if self.theta <= 0:
            raise SpecError(f"rope.theta={self.theta}: expected > 0")
        if isinstance(self.modulo, int) and self.modulo < 1:
            raise SpecError(f"rope.modulo={self.modulo}: expected at least 1, `mini_batch` or null")

    def build(self, size):
        self.only_in(size, "q", "k", "write_key")
        if size.width % 2:
            raise SpecError(f"layer.{size.name}: rope turns pairs of channels, got the odd head width {size.width}")
        modulo = self.modulo
        if modulo == "mini_batch":
            if not isinstance(size.mini_batch, int):
                got = f"mini_batch={size.mini_batch!r}"
                raise SpecError(f"layer.{size.name}: rope.modulo='mini_batch' needs a number, got {got}")
            modulo = size.mini_batch
        return RopeModule(self.theta, modulo)


class RopeModule(StageModule):
    position = True

    def __init__(self, theta: float, modulo: int | None):
        super().__init__()
        self.theta, self.modulo = theta, modulo

    def forward(self, x, call):
        half = x.shape[-1] // 2
        assert call.position is not None  # `position = True` above asks for it
        position = call.position if self.modulo is None else call.position % self.modulo
        exponent = torch.arange(half, device=x.device, dtype=torch.float64) / half
        angle = position[..., None].double() * self.theta**-exponent  # float64: exact for long sequences
        cos, sin = (f(angle).to(x.dtype)[:, :, None] for f in (torch.cos, torch.sin))
        left, right = x.split(half, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)

    def extra_repr(self) -> str:
        return f"theta={self.theta}, modulo={self.modulo}"
