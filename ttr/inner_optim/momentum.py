"""Heavy-ball and Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..registry import optimizer
from ..signals import Signal, signal
from .base import Optimizer


@optimizer("momentum")
@dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """N <- momentum N - step g(W);  W <- W + N.  With nesterov the gradient is taken at W + momentum N.

    Sources: Titans (2501.00663) eq. 9-10; Nesterov (1983).
    """

    linear: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    step: Signal = signal("sigmoid")
    momentum: Signal = signal("sigmoid")
    nesterov: bool = False

    def point(self, z, s):
        w, n = z
        return w + s.momentum * n if self.nesterov else w

    def update(self, z, g, s):
        w, n = z
        n = s.momentum * n - s.step * g
        return (w + n, n)
