"""Adam as an inner optimizer: scale invariant, so it has two rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..registry import SpecError, optimizer
from ..signals import Signal, signal
from .base import Optimizer


@optimizer("adam")
@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """g <- weight g;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  W <- W - step m^ / (sqrt(v^) + eps).

    m^ = m / (1 - b1^t), v^ = v / (1 - b2^t). `weight` is inside the moments, `step` outside: a common factor of the
    gradients changes nothing. Source: Adam (1412.6980).
    """

    slots: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment", "steps_taken")

    step: Signal = signal("sigmoid", scale=0.1)
    weight: Signal = signal(1.0)
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecError(f"optimizer.{name}={getattr(self, name)}: expected 0 <= {name} < 1")
        if not self.eps > 0:
            raise SpecError(f"optimizer.eps={self.eps}: expected > 0 (a gradient of zero makes no step)")

    def init_slots(self, w):
        return (torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w))

    def update(self, z, g, s):
        w, m, v, t = z
        g, t = s.weight * g, t + 1
        m = self.beta1 * m + (1 - self.beta1) * g
        v = self.beta2 * v + (1 - self.beta2) * g * g
        m_hat, v_hat = m / (1 - self.beta1**t), v / (1 - self.beta2**t)
        # sqrt has an infinite slope at 0, where its outer gradient would be 0 * inf: keep it away from 0
        root = torch.where(v_hat > 0, v_hat, torch.ones_like(v_hat)).sqrt() * (v_hat > 0)
        return (w - s.step * m_hat / (root + self.eps), m, v, t)
