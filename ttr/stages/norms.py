"""Norms: of keys and queries (l2, sum), and with a learned weight, of the output (rms, layer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.rms_norm import rms_norm
from ..kernels.unit_norm import unit_norm
from ..registry import stage
from .base import Stage, StageModule

Over = Literal["head", "all"]
Affine = Literal["none", "shared", "heads"]


@dataclass(frozen=True, kw_only=True)
class Norm(Stage):
    """over: one head, or all heads of a token together (each micro-step's by themselves)."""

    over: Over = "head"

    def normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"norm {self.kind!r} must define normalise(x)")

    def rounded(self, x: Tensor) -> Tensor:
        """normalise(x) in float32 at least, in x's dtype."""
        return self.normalise(_wide(x)).to(x.dtype)

    def weighed(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """normalise(x) * weight, [width], in one step and in x's dtype where torch has such a step, else None."""
        return None

    def build(self, size):
        return NormModule(self, size, affine="none", bias=False)


@stage("l2")
@dataclass(frozen=True, kw_only=True)
class L2(Norm):
    """x / sqrt(sum x^2 + eps): unit keys keep the delta rule's eigenvalues in [-1, 1] for steps in [0, 2]."""

    eps: float = 1e-6

    def normalise(self, x):
        return unit_norm(x, self.eps)

    def rounded(self, x):
        return unit_norm(x, self.eps) if type(self) is L2 else super().rounded(x)


@stage("sum")
@dataclass(frozen=True, kw_only=True)
class Sum(Norm):
    """x / (sum x + eps), for positive features. Source: fast-weight programmers (2102.11174)."""

    eps: float = 1e-6

    def normalise(self, x):
        return x / (x.sum(-1, keepdim=True) + self.eps)


@dataclass(frozen=True, kw_only=True)
class AffineNorm(Norm):
    """affine: no learned weight, one per channel shared by the heads, or one per head and channel. bias: likewise."""

    eps: float = 1e-5
    affine: Affine = "shared"
    bias: bool = False

    def build(self, size):
        return NormModule(self, size, affine=self.affine, bias=self.bias)


@stage("rms")
@dataclass(frozen=True, kw_only=True)
class RMS(AffineNorm):
    """x / sqrt(mean x^2 + eps) * weight. Source: 1910.07467."""

    def normalise(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def weighed(self, x, weight):
        """A weight of another dtype torch's kernel does not take, and rounds twice instead; under autocast it gives float32 out."""
        return rms_norm(x, weight, self.eps) if type(self) is RMS and weight.dtype == x.dtype else None


@stage("layer")
@dataclass(frozen=True, kw_only=True)
class LayerNorm(AffineNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias; per head with affine=heads it is GroupNorm. Source: 1607.06450."""

    affine: Affine = "heads"
    bias: bool = True

    def normalise(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class NormModule(StageModule):
    """weight, bias: [width] shared by the heads, or [heads, width]."""

    def __init__(self, stage: Norm, size, affine: Affine, bias: bool):
        super().__init__()
        self.stage = stage
        self.micro_steps = size.micro_steps
        heads = size.heads if affine == "heads" or stage.over == "all" else 1
        self.weight = nn.Parameter(torch.empty(heads, size.width)) if affine != "none" else None
        self.bias = nn.Parameter(torch.empty(heads, size.width)) if bias and affine != "none" else None
        self.reset_parameters()

    def reset_parameters(self):
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x, call):
        whole = x.unflatten(2, (self.micro_steps, -1)).flatten(-2) if self.stage.over == "all" else x
        if self.weight is None:
            return self.stage.rounded(whole).view(x.shape)
        if self.bias is None and self.weight.numel() == whole.shape[-1]:
            y = self.stage.weighed(whole, self.weight.flatten())
            if y is not None:
                return y.view(x.shape)
        y = self.stage.normalise(_wide(whole)).view(x.shape) * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        weight = None if self.weight is None else list(self.weight.shape)
        return f"{self.stage.kind}, over={self.stage.over}, weight={weight}, bias={self.bias is not None}"
