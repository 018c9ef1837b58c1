"""Forgetting gates: how much of the weights a token keeps before it is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .constant import constant
from .piece import Piece
from .registry import GATES, SpecError, gate
from .signals import Signal, signal

Order = Literal["first", "coupled"]


@dataclass(frozen=True, kw_only=True)
class Gate(Piece):
    """W <- exp(log_decay) W before the token's update (decays), or W <- project(W) after it (projects).

    order: where the gradient is taken, at the decayed weights (`first`: Gated DeltaNet, KDA) or at the undecayed
    ones (`coupled`: weight decay; Titans, RWKV-7).
    """

    registry: ClassVar = GATES
    decays: ClassVar[bool] = True
    projects: ClassVar[bool] = False
    per_key: ClassVar[bool] = False  # one decay per key channel instead of one per head
    order: Order = "first"

    def log_decay(
        self, signals: dict[str, Tensor], *, n_heads: int, layer_idx: int = 0, n_layers: int = 1, params: dict[str, Tensor]
    ) -> Tensor | None:
        """The natural log of what is kept, [Hv], [..., Hv] or, when `per_key`, [..., Hv, dk]; None keeps all."""
        raise NotImplementedError(f"gate {self.kind!r} must define log_decay")

    def project(self, weight: Tensor, before: Tensor) -> Tensor:
        """One weight tensor of a head as it stays, after the update and from what it was before it (projects)."""
        raise NotImplementedError(f"gate {self.kind!r} has projects=True and must define project(weight, before)")

    def init_params(self, n_heads: int, dk: int) -> dict[str, Tensor]:
        """Learned constants that are not per token, each with leading [n_heads]."""
        return {}


@gate("none")
@dataclass(frozen=True, kw_only=True)
class NoGate(Gate):
    """Nothing is forgotten but what the optimizer overwrites; so `order` makes no difference and is dropped."""

    decays: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "order", "first")

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return None


@gate("weight_norm")
@dataclass(frozen=True, kw_only=True)
class WeightNorm(Gate):
    """W_:c <- W_:c ||W_:c before|| / ||W_:c||, after every update and for every output unit c: the lengths of the start stay.

    Norms are sqrt(sum of squares + eps^2), so a unit that is zero stays about zero. Vectors (biases) are left alone. What
    is written takes the room of what was there before, so nothing else forgets and `order` is dropped.
    Source: LaCT (2505.23884), the post-norm of its fast weights.
    """

    decays: ClassVar[bool] = False
    projects: ClassVar[bool] = True
    eps: float = 1e-5

    def __post_init__(self):
        object.__setattr__(self, "order", "first")
        if not self.eps > 0:
            raise SpecError(f"gate.eps={self.eps}: expected > 0 (a unit of zero has no direction)")

    def check(self, spec):
        if spec.regressor.family != "trained":
            raise SpecError(f"gate='weight_norm' keeps the lengths of weights that are trained, got regressor={spec.regressor.kind!r}")
        if spec.read.normalizer != "none":
            raise SpecError("gate='weight_norm' would rescale the value channel that read.normalizer adds; use read.normalizer none")

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return None

    def project(self, weight, before):
        if weight.ndim < 2:
            return weight
        squares = (x.square().sum(-2, keepdim=True) + self.eps**2 for x in (before, weight))
        return weight * torch.sqrt(next(squares) / next(squares))


def retnet_log_decay(n_heads: int) -> Tensor:
    """log(1 - 2^(-5-h)), h = 0..H-1. Source: RetNet (2307.08621)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(n_heads, dtype=torch.float64)))


def lightning_log_decay(n_heads: int, layer_idx: int, n_layers: int) -> Tensor:
    """-(8h/H)(1 - layer_idx/n_layers), h = 0..H-1; head 0 keeps all. Source: Lightning Attention (2405.17381)."""
    return -(8.0 * torch.arange(n_heads, dtype=torch.float64) / n_heads) * (1.0 - layer_idx / n_layers)


@gate("fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(Gate):
    """A decay per head that does not depend on the input.

    decay: `retnet`, `lightning` (needs the layer's index), a list of one natural log decay per head, or `learned`.
    """

    decay: Literal["retnet", "lightning", "learned"] | tuple[float, ...] = "retnet"

    def __post_init__(self):
        if self.decay == ():
            raise SpecError("gate.decay=[]: expected one natural log decay per head")
        if isinstance(self.decay, tuple) and not all(d <= 0 for d in self.decay):
            raise SpecError(f"gate.decay={list(self.decay)}: natural log decays must be <= 0")

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        if self.decay == "retnet":
            return retnet_log_decay(n_heads)
        if self.decay == "lightning":
            return lightning_log_decay(n_heads, layer_idx, n_layers)
        if self.decay == "learned":
            return F.logsigmoid(params["decay_logit"])
        if len(self.decay) != n_heads:
            raise SpecError(f"gate.decay lists {len(self.decay)} decays for {n_heads} heads")
        return torch.tensor(self.decay, dtype=torch.float64)

    def init_params(self, n_heads, dk):
        if self.decay != "learned":
            return {}
        keep = torch.exp(retnet_log_decay(n_heads))  # start where RetNet stands
        return {"decay_logit": (keep.log() - torch.log1p(-keep)).float()}


@gate("scalar")
@dataclass(frozen=True, kw_only=True)
class Scalar(Gate):
    """One data-dependent log decay per head; a signal (map `mamba` unless another is declared) plus `order`."""

    inline_signal: ClassVar[str] = "log_decay_signal"
    log_decay_signal: Signal = signal("mamba")

    def signals(self):
        return {"log_decay": self.log_decay_signal}

    def check(self, spec):
        if self.log_decay_signal.per != "head":
            raise SpecError(f"gate.per={self.log_decay_signal.per!r}: a scalar gate is per head; use kind vector for per key")
        check_log_decay(self.log_decay_signal)

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return signals["log_decay"]


@gate("vector")
@dataclass(frozen=True, kw_only=True)
class Vector(Gate):
    """One data-dependent log decay per key channel (GLA, KDA, RWKV-7)."""

    inline_signal: ClassVar[str] = "log_decay_signal"
    per_key: ClassVar[bool] = True
    log_decay_signal: Signal = signal("mamba", per="key", rank="head_dim")

    def signals(self):
        return {"log_decay": self.log_decay_signal}

    def check(self, spec):
        if self.log_decay_signal.per != "key" and not self.log_decay_signal.constant:
            raise SpecError(f"gate.per={self.log_decay_signal.per!r}: a vector gate is per key; use kind scalar for per head")
        check_log_decay(self.log_decay_signal)

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return signals["log_decay"]


@constant
def constant_decay(
    gate: Gate, n_heads: int, device: torch.device, dtype: torch.dtype = torch.float32, layer_idx: int = 0, n_layers: int = 1
) -> Tensor | None:
    """[Hv] of a gate without signals and params, brought to the device once."""
    decay = gate.log_decay({}, n_heads=n_heads, layer_idx=layer_idx, n_layers=n_layers, params={})
    return None if decay is None else decay.to(device, dtype)


def check_log_decay(s: Signal) -> None:
    """A gate's value is a log decay, so its map and scale must not give positive numbers."""
    if s.constant and s.value is not None and not (s.value <= 0 and not math.isnan(s.value)):
        raise SpecError(f"gate={s.value}: a gate's value is a natural log decay, <= 0")
    sign = {"mamba": -1, "logsigmoid": -1, "sigmoid": 1, "softplus": 1, "exp": 1}.get(s.map.kind)
    if not s.constant and sign is not None and sign * s.scale > 0:
        raise SpecError(
            f"gate.map={s.map.kind!r} with scale={s.scale} gives positive log decays (weights would grow); "
            f"use a negative scale, or a map whose values are <= 0: ['logsigmoid', 'mamba']"
        )
