"""Step rules: how the declared step becomes the one that is taken. They compose with any first-order optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..piece import Piece
from ..registry import STEP_RULES, SpecError, step_rule


@dataclass(frozen=True, kw_only=True)
class StepRule(Piece):
    registry: ClassVar = STEP_RULES

    def effective(self, step: Tensor, k: Tensor, curvature: float) -> Tensor:
        """step: [..., d1, d2] (d1 = 1 or dk, d2 = 1 or dv); k: [..., dk, 1]; curvature: of the objective. Same shape out."""
        raise NotImplementedError(f"step rule {self.kind!r} must define effective(step, k, curvature)")


@step_rule("plain")
@dataclass(frozen=True, kw_only=True)
class Plain(StepRule):
    """The step as declared."""

    def effective(self, step, k, curvature):
        return step


@step_rule("nlms")
@dataclass(frozen=True, kw_only=True)
class NLMS(StepRule):
    """step / (eps + ||k||^2): normalised least mean squares; stable for 0 < step < 2."""

    eps: float = 1e-6

    def __post_init__(self):
        if not self.eps > 0:
            raise SpecError(f"step_rule.eps={self.eps}: expected eps > 0")

    def effective(self, step, k, curvature):
        return step / (self.eps + k.square().sum(-2, keepdim=True))


@step_rule("implicit")
@dataclass(frozen=True, kw_only=True)
class Implicit(StepRule):
    """step / (1 + c sum_d step_d k_d^2), c the objective's curvature (1 for l2, 0 for dot): the gradient at the new
    weights, W' = W - step grad(W'). Contracts for any step > 0. Source: Longhorn (2407.14207), exact form."""

    def effective(self, step, k, curvature):
        return step / (1 + curvature * (step * k.square()).sum(-2, keepdim=True)) if curvature else step
