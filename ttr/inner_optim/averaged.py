"""Sgd whose reader sees a running average of the weights (Polyak averaging at test time)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..registry import optimizer
from ..signals import Signal, signal
from .base import Optimizer


@optimizer("averaged")
@dataclass(frozen=True, kw_only=True)
class Averaged(Optimizer):
    """W <- W - step g;  A <- (1 - average) A + average W;  the query reads A.  The gate decays both."""

    linear: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("average",)
    decayed: ClassVar[tuple[str, ...]] = ("weights", "average")

    step: Signal = signal("sigmoid")
    average: Signal = signal("sigmoid")

    def init_slots(self, w):
        return (w,)

    def update(self, z, g, s):
        w, a = z
        w = w - s.step * g
        return (w, a + s.average * (w - a))

    def read(self, z, s):
        return z[1]
