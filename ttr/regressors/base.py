"""What a regressor is: initial weights and a prediction, for one head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..piece import Piece
from ..registry import REGRESSORS


class Init(NamedTuple):  # which torch.compile can make, other than a frozen dataclass (torch 2.11)
    """How one tensor of a head begins: N(0, std^2) around `value`; learned tensors become parameters of the layer."""

    shape: tuple[int, ...]
    value: float = 0.0
    std: float = 0.0
    learned: bool = True

    def __call__(self, n_heads: int, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
        full = torch.full((n_heads, *self.shape), self.value, device=device)
        return full + self.std * torch.randn(full.shape, generator=generator, device=device) if self.std else full


class Layers(NamedTuple):
    """f(x) = [x +] [LN](x W [+ b]), or with an activation a [x +] [LN](a(x W [+ b]) V [+ c]).

    W, b, V, c, in this order, are the only weights; the norm's scale and shift are `outer`. activation: of `mlp.ACTIVATIONS`.
    """

    residual: bool = False
    eps: float = 0.0
    activation: str | None = None


def zeros(*shape: int, learned: bool = True) -> Init:
    return Init(shape, learned=learned)


def ones(*shape: int) -> Init:
    return Init(shape, value=1.0)


def normal(*shape: int, std: float | None = None) -> Init:
    """N(0, std^2); std defaults to fan_in^-1/2, fan_in the first axis."""
    return Init(shape, std=1 / math.sqrt(shape[0]) if std is None else std)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W (+ b): the one way a regressor touches its inner weights if it wants the dual form (x: [..., d_in])."""
    apply = getattr(weight, "ttr_linear", None)  # a recorded weight of the dual form, see kernels/torch/dual_weights.py
    if apply is not None:
        return apply(x, bias)
    out = x @ weight
    return out if bias is None else out + bias


@dataclass(frozen=True, kw_only=True)
class Regressor(Piece):
    """f(x; w). `init` names every tensor of a head; those in `outer` are not touched by the inner optimizer."""

    registry: ClassVar = REGRESSORS
    linear: ClassVar[bool] = False  # f(k) = k W with one matrix `W`: what the closed forms need
    family: ClassVar[str] = "trained"  # trained by a first-order optimizer | least_squares | kernel
    dual: ClassVar[bool] = False  # inner weights enter through `linear` alone, so mini-batches have a dual form
    outer: ClassVar[tuple[str, ...]] = ()

    def init(self, dk: int, dv: int) -> dict[str, Init]:
        raise NotImplementedError(f"regressor {self.kind!r} must define init(dk, dv)")

    def predict(self, w: dict[str, Tensor], x: Tensor) -> Tensor:
        """One head: x [..., dk] -> [..., dv]."""
        raise NotImplementedError(f"regressor {self.kind!r} must define predict(w, x)")

    def state_shapes(self, dk: int, dv: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a head's state that move while reading."""
        return {name: init.shape for name, init in self.init(dk, dv).items() if name not in self.outer}

    def layers(self) -> Layers | None:
        """What a kernel has to know of a regressor that is one linear layer or two; None: it is something else."""
        return None

    def key_axis(self) -> tuple[str, ...]:
        """The tensors whose first axis is the key: what a vector gate decays."""
        return ()

    def check_sizes(self, dk: int, dv: int) -> None:
        """Raise ValueError when these head sizes cannot be used."""
