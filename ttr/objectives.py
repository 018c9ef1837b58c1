"""Inner objectives: the loss one (k, v) pair puts on the regressor's prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .constant import constant
from .piece import Piece
from .registry import OBJECTIVES, SpecError, objective
from .signals import Signal, signal


@dataclass(frozen=True, kw_only=True)
class Objective(Piece):
    """A loss on (prediction, target); `quadratic=True` promises a gradient affine in both, which lowering probes."""

    registry: ClassVar = OBJECTIVES
    quadratic: ClassVar[bool] = False

    def loss(self, prediction: Tensor, target: Tensor, s) -> Tensor:
        """prediction, target: [dv] -> scalar; `s` holds the token's signals."""
        raise NotImplementedError(f"objective {self.kind!r} must define loss(prediction, target, s)")

    def check(self, spec):
        for name, s in self.signals().items():
            if s.per not in ("head", "value"):
                raise SpecError(
                    f"objective.{name}.per={s.per!r}: a loss sees predictions, which have no {s.per} axis; choose from ['head', 'value']"
                )
        if self.quadratic and self.signals():
            raise SpecError(
                f"objective {self.kind!r} says quadratic=True, but has the signals {sorted(self.signals())}: "
                "its slopes are probed once for all tokens"
            )
        if self.quadratic:
            slopes(self, 3)


@constant
def slopes(objective: Objective, dv: int) -> tuple[float, float]:
    """Probe dL/dprediction = curvature * prediction - gain * target of a quadratic objective on dv channels."""
    # forward mode: nothing is saved for backward, so activation checkpointing around a layer sees nothing of it
    gradient = torch.func.jacfwd(lambda p, v: objective.loss(p, v, None))
    one, zero = torch.ones(dv, dtype=torch.float64), torch.zeros(dv, dtype=torch.float64)
    curvature, gain = gradient(one, zero), -gradient(zero, one)
    x = torch.linspace(-2, 3, dv, dtype=torch.float64)
    y = torch.linspace(1, -4, dv, dtype=torch.float64)
    affine = all(
        torch.allclose(gradient(a * x, a * y), a * (curvature * x - gain * y)) for a in (1e-3, 1.0, 1e3)
    )  # a kink may lie anywhere
    if not affine or (curvature != curvature[0]).any() or (gain != gain[0]).any():
        raise SpecError(f"objective {objective.kind!r} says quadratic=True, but its gradient is not curvature*prediction - gain*target")
    return float(curvature[0]), float(gain[0])


@objective("dot")
@dataclass(frozen=True, kw_only=True)
class Dot(Objective):
    """-<f(k), v>: what linear attention descends."""

    quadratic: ClassVar[bool] = True

    def loss(self, prediction, target, s):
        return -(prediction * target).sum()


@objective("l2")
@dataclass(frozen=True, kw_only=True)
class L2(Objective):
    """1/2 ||f(k) - v||^2, summed or averaged over value channels; one sgd step on it is the delta rule."""

    quadratic: ClassVar[bool] = True
    reduce: Literal["sum", "mean"] = "sum"

    def loss(self, prediction, target, s):
        squared = 0.5 * (prediction - target).square()
        return squared.sum() if self.reduce == "sum" else squared.mean()


@objective("huber")
@dataclass(frozen=True, kw_only=True)
class Huber(Objective):
    """sum_c h(e_c), e = f(k) - v, h(e) = e^2/2 if |e| <= threshold else threshold (|e| - threshold/2).

    The robust loss of YAAD in MIRAS (2504.13173), taken channel by channel.
    """

    threshold: Signal = signal(1.0)

    def check(self, spec):
        super().check(spec)
        if self.threshold.value is not None and not self.threshold.value > 0:
            raise SpecError(f"objective.threshold={self.threshold.value}: expected > 0")

    def loss(self, prediction, target, s):
        error = (prediction - target).abs()
        inside = error.clamp(max=s.threshold)
        return (inside * (error - 0.5 * inside)).sum()  # right for an infinite threshold too


@objective("lp")
@dataclass(frozen=True, kw_only=True)
class Lp(Objective):
    """1/p sum_c |f(k)_c - v_c|^p, p > 1; the attentional bias of MONETA in MIRAS (2504.13173) at p = 3."""

    p: float = 3.0

    def __post_init__(self):
        if not 1 < self.p < math.inf:
            raise SpecError(f"objective.p={self.p}: expected 1 < p < inf (the gradient must exist, at zero error too)")

    def loss(self, prediction, target, s):
        error = prediction - target
        return (error.abs().pow(self.p) / self.p).sum()
