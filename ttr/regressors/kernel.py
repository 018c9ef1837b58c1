"""The non-parametric regressor: all pairs are kept and the query averages them with a kernel (softmax attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..registry import SpecError, regressor
from .base import Init, Regressor


@regressor("kernel")
@dataclass(frozen=True, kw_only=True)
class Kernel(Regressor):
    """o_t = sum_i a_ti v_i, a_ti = softmax_i(scale q_t^T k_i) over i <= t, or t - window < i <= t.

    prefix: of a sequence the first so many pairs stay in sight when the window has passed them.
    Source: 1706.03762; as local constant regression: 2501.12352; a kept prefix: 2309.17453, 2501.00663.
    """

    family: ClassVar[str] = "kernel"
    kernel: Literal["exp"] = "exp"
    window: int | None = None
    prefix: int = 0

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise SpecError(f"regressor.window={self.window}: expected at least 1, or null for all pairs")
        if self.prefix < 0:
            raise SpecError(f"regressor.prefix={self.prefix}: expected at least 0")
        if self.prefix and self.window is None:
            raise SpecError(f"regressor.prefix={self.prefix} is what a window does not pass; without a window every pair is kept")

    def kept(self, tokens: int) -> int:
        """How many of `tokens` pairs stay in the cache."""
        return tokens if self.window is None else min(tokens, self.prefix + self.window)

    def init(self, dk, dv) -> dict[str, Init]:
        return {}

    def state_shapes(self, dk, dv):
        return {}

    def check(self, spec):
        if spec.optimizer is not None:
            raise SpecError(f"regressor=kernel keeps every pair and has no optimizer, got {spec.optimizer.kind!r}")
        if spec.objective is not None:
            raise SpecError(f"regressor=kernel has no inner objective, got {spec.objective.kind!r}")
        if spec.gate.kind != "none":
            raise SpecError(f"regressor=kernel forgets by its window only, got gate={spec.gate.kind!r}")
        if spec.read.at != "after" or spec.read.normalizer != "none":
            raise SpecError("regressor=kernel reads after the token and normalises by itself: read.at=after, read.normalizer=none")
