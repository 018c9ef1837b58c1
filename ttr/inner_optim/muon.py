"""Muon as an inner optimizer: momentum, orthogonalised by Newton-Schulz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..registry import SpecError, optimizer
from ..signals import Signal, signal
from .base import Optimizer

COEFFICIENTS = {
    "standard": ((3.4445, -4.7750, 2.0315),) * 5,
    "lact": (  # LaCT (2505.23884), reference code: one triple per iteration
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


def newton_schulz(n: Tensor, coefficients, eps: float, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """An approximately orthogonal matrix near n: X <- aX + (bA + cA^2)X, A = XX^T, from X = n / (||n||_F + eps).

    product: of matrices. With 16-bit operands X itself is kept in its dtype, and the directions in which n is smaller than
    their rounding come out as noise: they are lifted as the others are.
    """
    x = n.mT if n.shape[-2] > n.shape[-1] else n
    square = x.square().sum((-2, -1), keepdim=True)
    x = x / ((square + eps * eps).sqrt() + eps)  # smooth at n = 0
    for a, b, c in coefficients:
        gram = product(x, x.mT)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.mT if n.shape[-2] > n.shape[-1] else x


@optimizer("muon")
@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """g <- weight g;  N <- momentum N + g;  W <- W - step NS5(N), for matrices; vectors take the plain momentum step.

    `weight` is inside the sum, `step` outside: Newton-Schulz removes any common factor. Sources: Muon (Jordan 2024);
    LaCT (2505.23884) for the test-time use and the per-iteration coefficients.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    step: Signal = signal(1.0)
    weight: Signal = signal(1.0)
    momentum: Signal = signal("sigmoid")
    coefficients: Literal["standard", "lact"] = "standard"
    eps: float = 1e-7

    def __post_init__(self):
        super().__post_init__()
        if not self.eps > 0:
            raise SpecError(f"optimizer.eps={self.eps}: expected > 0 (a gradient of zero makes no step)")

    def check(self, spec):
        super().check(spec)
        if spec.read.normalizer != "none":
            raise SpecError(
                "optimizer=muon turns whole matrices: the value channel that read.normalizer adds would be mixed with the others"
            )
        for name, s in self.signals().items():
            if s.per not in ("head", "tensor"):
                raise SpecError(f"optimizer.{name}.per={s.per!r}: muon turns whole matrices; choose from ['head', 'tensor']")

    def update(self, z, g, s):
        w, n = z
        n = s.momentum * n + s.weight * g
        direction = newton_schulz(n, COEFFICIENTS[self.coefficients], self.eps, s.product) if n.ndim >= 2 else n
        return (w - s.step * direction, n)
