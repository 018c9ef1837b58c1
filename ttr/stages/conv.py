"""Stages that look back in time: the short causal convolution and RWKV's token shift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..registry import SpecError, stage
from .base import Map, Stage, StageModule
from .features import SiLU


@stage("conv")
@dataclass(frozen=True, kw_only=True)
class Conv(Stage):
    """y_t = sum_{j < kernel_size} w_j x_{t-j} (+ bias), one filter per channel. Source: H3, Mamba (2312.00752)."""

    kernel_size: int = 4
    bias: bool = False

    def __post_init__(self):
        if self.kernel_size < 1:
            raise SpecError(f"conv.kernel_size={self.kernel_size}: expected at least 1")

    def build(self, size):
        return ConvModule(self, size)


class ConvModule(StageModule):
    """weight: [channels, kernel_size], the newest input last, as torch's depthwise Conv1d has it."""

    def __init__(self, stage: Conv, size):
        super().__init__()
        self.key = size.key
        self.history, self.channels = stage.kernel_size - 1, size.heads * size.width
        self.weight = nn.Parameter(torch.empty(self.channels, stage.kernel_size))
        self.bias = nn.Parameter(torch.empty(self.channels)) if stage.bias else None
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[1] ** -0.5  # Conv1d's own: one input channel per filter
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x, call, silu: bool = False):
        """silu: the SiLU of that."""
        flat = x.flatten(2)
        at_once = silu and bool(self.history) and self.bias is None
        y = call.convolve(self.key, flat, self.weight, at_once) if self.history else flat * self.weight[:, 0]
        if self.bias is not None:
            y = y + self.bias
        return (F.silu(y) if silu and not at_once else y).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kernel_size={self.weight.shape[1]}, bias={self.bias is not None}"


def with_silu(module: nn.Module, following: nn.Module) -> bool:
    """Whether a stage's module is a convolution that the next one is the SiLU of, and nobody's hook looks in between."""
    if type(module) is not ConvModule or type(following) is not Map or type(following.stage) is not SiLU:
        return False
    return not (module._forward_hooks or following._forward_hooks or following._forward_pre_hooks)


@stage("shift")
@dataclass(frozen=True, kw_only=True)
class Shift(Stage):
    """x_t + mix * (x_{t-1} - x_t), mix learned per channel of the layer's input; it comes before `proj`.

    mix_c = 1 - (c / d_model)^(power (1 - layer_idx / n_layers)) to begin with. Source: RWKV-7 (2503.14456), where
    power is 0.2 for r and g, 0.7 for k and v, 0.9 for w and a.
    """

    power: float = 0.7

    def build(self, size):
        if size.width != size.d_model or size.heads != 1:
            raise SpecError(f"layer.{size.name}: shift mixes the layer's input with the one before; put it before proj")
        return ShiftModule(self.power, size.d_model, size.layer_idx, size.n_layers)


class ShiftModule(StageModule):
    def __init__(self, power: float, d_model: int, layer_idx: int, n_layers: int):
        super().__init__()
        self.exponent = power * (1 - layer_idx / n_layers)
        self.mix = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        channel = torch.arange(len(self.mix), device=self.mix.device) / len(self.mix)
        self.mix.copy_(1 - channel**self.exponent)

    def forward(self, x, call):
        assert call.previous is not None  # the layer looks for shifts when it is built
        shape = x.shape
        x = x.flatten(2)
        return (x + self.mix * (call.previous - x)).view(shape)

    def extra_repr(self) -> str:
        return f"d_model={len(self.mix)}"
