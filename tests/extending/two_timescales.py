"""A brand-new inner optimizer, as a user would write it: one file, nothing of ttr touched."""

from dataclasses import dataclass
from typing import ClassVar

import ttr


@ttr.optimizer("two_timescales")
@dataclass(frozen=True, kw_only=True)
class TwoTimescales(ttr.Optimizer):
    """Fast weights learn, slow ones follow and pull them back; the query reads a mixture.

    F <- F - step g + pull (S - F);  S <- S + follow (F - S);  reads (1 - mix) F + mix S
    """

    linear: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("slow",)

    step: ttr.Signal = ttr.signal("sigmoid")
    pull: ttr.Signal = ttr.signal("sigmoid", bias=-3.0)
    follow: ttr.Signal = ttr.signal("sigmoid", bias=-2.0)
    mix: float = 0.25

    def point(self, z, s):
        fast, slow = z
        return fast + s.pull * (slow - fast)

    def update(self, z, g, s):
        fast, slow = z
        fast = fast - s.step * g + s.pull * (slow - fast)
        return fast, slow + s.follow * (fast - slow)

    def read(self, z, s):
        fast, slow = z
        return (1 - self.mix) * fast + self.mix * slow
