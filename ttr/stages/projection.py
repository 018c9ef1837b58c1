"""Where a stream comes from (`proj`), and learned factors on it (`layer_scale`, `affine`, `blend`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..registry import SpecError, stage
from .base import Stage, StageModule


@stage("proj")
@dataclass(frozen=True, kw_only=True)
class Proj(Stage):
    """The linear map into heads; a stream that does not name it begins with it.

    rank: width of a bottleneck. share: take the projected value of another stream, its token shift included.
    source: project the layer's input, or the finished v stream (Mamba, Longhorn).
    """

    rank: int | None = None
    share: Literal["q", "k", "v"] | None = None
    source: Literal["x", "v"] = "x"

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"proj.rank={self.rank}: expected at least 1, or null for a full matrix")
        if self.share is not None and (self.rank is not None or self.source != "x"):
            raise SpecError(f"proj.share={self.share!r} takes another stream's projection; set rank and source there")

    def build(self, size):
        raise SpecError(f"layer.{size.name}: a stream has one proj, and the output's projection is implied")


@stage("layer_scale")
@dataclass(frozen=True, kw_only=True)
class LayerScale(Stage):
    """x * w, w learned per channel, from `initial` (RWKV-7's k_k, 0.71)."""

    initial: float = 1.0

    def build(self, size):
        return AffineModule(size, self.initial, bias=False)


@stage("affine")
@dataclass(frozen=True, kw_only=True)
class Affine(Stage):
    """x * w + b, both learned per channel, from 1 and 0. Source: LaCT (2505.23884), on q and k."""

    def build(self, size):
        return AffineModule(size, 1.0, bias=True)


class AffineModule(StageModule):
    """weight, bias: [heads, width]."""

    def __init__(self, size, initial: float, bias: bool):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(size.heads, size.width))
        self.bias = nn.Parameter(torch.empty(size.heads, size.width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.initial)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x, call):
        y = x * self.weight
        return y if self.bias is None else y + self.bias


@stage("blend")
@dataclass(frozen=True, kw_only=True)
class Blend(Stage):
    """k * (1 + (s - 1) * w), s a signal per key channel, w learned per channel (RWKV-7's k_a, from 1.02)."""

    signal: str = "step"
    initial: float = 1.02

    def build(self, size):
        self.only_in(size, "write_key")
        return BlendModule(self, size)


class BlendModule(StageModule):
    def __init__(self, stage: Blend, size):
        super().__init__()
        self.stage = stage
        self.weight = nn.Parameter(torch.empty(size.heads, size.width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.stage.initial)

    def forward(self, x, call):
        if self.stage.signal not in call.signals:
            known = sorted(call.signals)
            raise SpecError(f"layer.write_key: blend.signal={self.stage.signal!r} is not projected; choose from {known}")
        signal = call.signals[self.stage.signal].to(x.dtype)
        signal = signal.flatten(2, -2) if signal.ndim > 4 else signal  # micro-steps into heads
        if signal.shape != x.shape:
            raise SpecError(
                f"layer.write_key: blend needs {self.stage.signal!r} per key channel and n_key_heads = n_heads, "
                f"got {list(signal.shape)} for keys {list(x.shape)}"
            )
        return x * (1 + (signal - 1) * self.weight)
