"""Feature maps, applied per head: the activation or expansion that makes a key."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import SpecError, stage
from .base import Stage, StageModule


@stage("silu")
@dataclass(frozen=True, kw_only=True)
class SiLU(Stage):
    """x sigmoid(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x)


@stage("relu")
@dataclass(frozen=True, kw_only=True)
class ReLU(Stage):
    """max(x, 0)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


@stage("gelu")
@dataclass(frozen=True, kw_only=True)
class GELU(Stage):
    """x Phi(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.gelu(x)


@stage("elu1")
@dataclass(frozen=True, kw_only=True)
class ELU1(Stage):
    """elu(x) + 1 > 0. Source: linear attention (2006.16236)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


@stage("dpfp")
@dataclass(frozen=True, kw_only=True)
class DPFP(Stage):
    """[r * roll(r, 1), ..., r * roll(r, nu)], r = [relu(x), relu(-x)]: d -> 2 d nu. Source: 2102.11174."""

    nu: int = 1

    def __post_init__(self):
        if self.nu < 1:
            raise SpecError(f"dpfp.nu={self.nu}: expected at least 1")

    def width(self, width):
        return 2 * width * self.nu

    def __call__(self, x: Tensor) -> Tensor:
        r = torch.cat([F.relu(x), F.relu(-x)], -1)
        return torch.cat([r * r.roll(j, -1) for j in range(1, self.nu + 1)], -1)


@stage("taylor")
@dataclass(frozen=True, kw_only=True)
class Taylor(Stage):
    """[1, x / d^1/4, vec(x x^T) / sqrt(2 d)], whose inner products are 1 + s + s^2/2, s = <x, y> / sqrt(d).

    d -> 1 + d + d^2. Source: Based (2402.18668).
    """

    def width(self, width):
        return 1 + width + width * width

    def __call__(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) * (2 * d) ** -0.5
        return torch.cat([torch.ones_like(x[..., :1]), x * d**-0.25, square], -1)


@stage("polynomial")
@dataclass(frozen=True, kw_only=True)
class Polynomial(Stage):
    """All monomials of degree <= p, weighted so that <phi(x), phi(y)> is (1 + <x, y>)^p, or sum_(i <= p) <x, y>^i / i!.

    products: power or exp, which of the two. d -> C(d + p, p). Source: Atlas (2505.23735), which also learns the
    coefficients, from 1/i! (`layer_scale` after it).
    """

    degree: int = 2
    products: Literal["power", "exp"] = "power"

    def __post_init__(self):
        if self.degree < 1:
            raise SpecError(f"polynomial.degree={self.degree}: expected at least 1")

    def width(self, width):
        return len(self._monomials(width))

    def _monomials(self, d: int) -> list[tuple[int, ...]]:
        return list(itertools.combinations_with_replacement(range(d + 1), self.degree))  # d stands for the factor 1

    def __call__(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        monomials = self._monomials(d)
        counts = torch.zeros(len(monomials), d + 1)
        counts.scatter_add_(1, torch.tensor(monomials), torch.ones(len(monomials), self.degree))
        if self.products == "power":
            weight = torch.exp(torch.lgamma(torch.tensor(self.degree + 1.0)) - torch.lgamma(counts + 1).sum(-1)).round()
        else:
            weight = 1 / torch.exp(torch.lgamma(counts[:, :d] + 1).sum(-1)).round()
        padded = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        factors = padded[..., torch.tensor(monomials, device=x.device)]  # [..., monomials, degree]
        return factors.prod(-1) * weight.to(x).sqrt()


@stage("hedgehog")
@dataclass(frozen=True, kw_only=True)
class Hedgehog(Stage):
    """[softmax(W x), softmax(-W x)] with W: [heads, d, features] learned, from the identity: d -> 2 features.

    Source: LoLCATs (2410.10254), after Hedgehog (2402.04347).
    """

    features: int | None = None

    def __post_init__(self):
        if self.features is not None and self.features < 1:
            raise SpecError(f"hedgehog.features={self.features}: expected at least 1, or null for the head width")

    def width(self, width):
        return 2 * (self.features or width)

    def build(self, size):
        return HedgehogModule(size, self.features or size.width)


class HedgehogModule(StageModule):
    def __init__(self, size, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size.heads, size.width, features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        self.weight.copy_(torch.eye(*self.weight.shape[1:], device=self.weight.device).expand_as(self.weight))

    def forward(self, x, call):
        y = torch.einsum("bthd,hdf->bthf", x, self.weight)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
