"""Least squares over all pairs read so far: the statistics (G, H) are the state, the solver is the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..registry import SpecError, regressor
from ..signals import Signal, signal
from .base import Init, Regressor


@regressor("least_squares")
@dataclass(frozen=True, kw_only=True)
class LeastSquares(Regressor):
    """G_t = a_t G_{t-1} + weight k v^T,  H_t = a_t H_{t-1} + weight k k^T,  o_t = G_t^T (H_t + Lambda)^{-1} q_t.

    Lambda = softplus(l) + ridge_floor per key channel and head, learned from `ridge` (its first value).
    ridge_decays: Lambda is forgotten with the statistics (recursive least squares) or stays (MesaNet). With a
    vector gate a: [dk], G_t = diag(a) G and H_t = diag(a)^1/2 H diag(a)^1/2, so H stays positive and the scalar case
    is unchanged. A decaying ridge that has lost all but rounding errors leaves a read that only recent keys determine:
    finite, not accurate; a constant one bears any gate. The definition: ttr/least_squares.py.
    Sources: Mesa (2309.05858); MesaNet (2506.05233).
    """

    family: ClassVar[str] = "least_squares"

    weight: Signal = signal("sigmoid")
    ridge: float = 1.0
    ridge_floor: float = 0.25
    ridge_decays: bool = False

    def __post_init__(self):
        if self.ridge_floor < 0 or not self.ridge > self.ridge_floor:
            raise SpecError(f"regressor.ridge={self.ridge}, ridge_floor={self.ridge_floor}: expected 0 <= ridge_floor < ridge")

    @property
    def never_negative(self) -> bool:
        """Whether no weight is, as declared: then each has a square root."""
        return self.weight.constant or (self.weight.map.kind in ("sigmoid", "softplus", "exp") and self.weight.scale >= 0)

    def init(self, dk, dv) -> dict[str, Init]:
        softplus_inverse = math.log(math.expm1(self.ridge - self.ridge_floor))
        return {"ridge": Init((dk,), value=softplus_inverse)}

    def state_shapes(self, dk, dv):
        statistics = {"G": (dk, dv), "H": (dk, dk)}
        return {**statistics, "ridge_scale": (dk,)} if self.ridge_decays else statistics

    def check(self, spec):
        if spec.optimizer.kind not in ("rls", "cg", "cholesky"):
            rule = spec.optimizer.step_rule.kind  # nlms and implicit are delta with another
            raise SpecError(
                f"regressor=least_squares is solved, not descended: optimizer must be one of ['cg', 'cholesky', 'rls'], "
                f"got {spec.optimizer.kind!r}" + ("" if rule == "plain" else f" with step_rule {rule!r}")
            )
        if spec.objective.kind != "l2" or spec.objective.reduce != "sum":
            raise SpecError("regressor=least_squares has objective l2 (sum) by definition")
        if spec.gate.order != "first":
            raise SpecError("gate.order='coupled' speaks of a gradient; least_squares takes none")
        if self.weight.per != "head":
            raise SpecError(f"regressor.weight.per={self.weight.per!r}: one weight per pair and head")
        if self.weight.value is not None and self.weight.value < 0:
            raise SpecError(f"regressor.weight={self.weight.value}: expected >= 0, or H would not stay positive")
