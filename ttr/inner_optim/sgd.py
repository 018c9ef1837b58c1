"""Stochastic gradient descent; with `linear` it descends the inner product, which is linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..registry import optimizer
from .base import Optimizer


@optimizer("sgd")
@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """W <- W - step g."""

    linear: ClassVar[bool] = True

    def update(self, z, g, s):
        (w,) = z
        return (w - s.step * g,)
