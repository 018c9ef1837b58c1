"""The linear matrix: f(k) = k W, the regressor of linear attention and the delta family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..registry import regressor
from .base import Init, Layers, Regressor, normal, zeros
from .base import linear as apply


@regressor("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(Regressor):
    """f(x) = x W, W: [dk, dv]; W_0 is zero or learned."""

    linear: ClassVar[bool] = True
    dual: ClassVar[bool] = True
    initial: Literal["zero", "learned"] = "zero"

    def init(self, dk, dv) -> dict[str, Init]:
        return {"W": zeros(dk, dv, learned=False) if self.initial == "zero" else normal(dk, dv)}

    def layers(self):
        return Layers()

    def key_axis(self):
        return ("W",)

    def predict(self, w, x):
        return apply(x, w["W"])
