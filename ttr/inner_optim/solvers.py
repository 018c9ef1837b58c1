"""Solvers of the least-squares regressor's normal equations (H_t + Lambda) x = q."""

from __future__ import annotations

from dataclasses import dataclass

from ..registry import SpecError, optimizer
from .base import Solver


@optimizer("cholesky")
@dataclass(frozen=True, kw_only=True)
class Cholesky(Solver):
    """The exact read: factor H_t + Lambda at every token."""


@optimizer("cg")
@dataclass(frozen=True, kw_only=True)
class CG(Solver):
    """`iterations` steps of conjugate gradients from x = 0, all tokens at once; backward solves again.

    tolerance: a token whose squared residual falls below tolerance^2 ||q||^2 stops moving. Source: MesaNet (2506.05233).
    """

    iterations: int = 30
    tolerance: float = 0.0

    def __post_init__(self):
        if self.iterations < 1:
            raise SpecError(f"optimizer.iterations={self.iterations}: expected at least 1")
        if self.tolerance < 0:
            raise SpecError(f"optimizer.tolerance={self.tolerance}: expected >= 0")


@optimizer("rls")
@dataclass(frozen=True, kw_only=True)
class RLS(Solver):
    """Recursive least squares: the inverse is carried by Sherman-Morrison. Source: Mesa (2309.05858).

    Under a vector gate no recursion for the solution is left: then the statistics are carried and solved.
    """

    def check(self, spec):
        super().check(spec)
        if spec.gate.decays and not spec.regressor.ridge_decays:
            raise SpecError(
                "optimizer=rls with a gate forgets its ridge too: set regressor.ridge_decays=true, "
                "or keep the ridge constant with optimizer cg or cholesky"
            )
