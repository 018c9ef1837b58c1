"""The delta rule: sgd on the squared error. `multistep`, `nlms` and `implicit` are spellings of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..registry import OPTIMIZERS, SpecError, optimizer
from ..signals import Signal, signal
from .sgd import SGD


@optimizer("delta")
@dataclass(frozen=True, kw_only=True)
class Delta(SGD):
    """W <- W - step (f(k) - v) df/dW. Source: DeltaNet (2102.11174, 2406.06484)."""

    step: Signal = signal("sigmoid")

    def check(self, spec):
        if spec.objective.kind != "l2":
            raise SpecError(
                f"optimizer=delta is sgd on objective l2, got objective={spec.objective.kind!r}; set objective: l2, or write optimizer: sgd"
            )
        super().check(spec)


OPTIMIZERS.alias("multistep", "delta")
OPTIMIZERS.alias("nlms", "delta", step_rule="nlms")
OPTIMIZERS.alias("implicit", "delta", step_rule="implicit", step="softplus")
