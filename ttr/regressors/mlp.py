"""Multi-layer perceptrons as memories: TTT-Linear (depth 1), TTT-MLP and Titans (depth 2), SwiGLU (LaCT)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from ..registry import SpecError, regressor
from .base import Init, Layers, Regressor, linear, normal, ones, zeros

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


@regressor("mlp")
@dataclass(frozen=True, kw_only=True)
class MLP(Regressor):
    """z(x) = W_L a(... a(x W_1 + b_1) ...) + b_L, hidden width expansion * dk;  f(x) = [x +] [LN](z(x)).

    norm: a LayerNorm on z whose learned affine (norm_weight, norm_bias) the inner optimizer does not touch.
    residual adds x (then dk = dv). glu: z(x) = W_2 (a(x W_1) * x W_3), depth 2. weight_std: standard deviation of
    W_0 (null: fan_in^-1/2). Sources: TTT (2407.04620); Titans (2501.00663); LaCT (2505.23884).
    """

    outer: ClassVar[tuple[str, ...]] = ("norm_weight", "norm_bias")
    dual: ClassVar[bool] = True

    depth: int = 2
    expansion: float = 4.0
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "tanh"] = "gelu"
    glu: bool = False
    bias: bool = False
    norm: Literal["layer", "none"] = "layer"
    residual: bool = True
    weight_std: float | None = None
    eps: float = 1e-6

    def __post_init__(self):
        if self.depth < 1:
            raise SpecError(f"regressor.depth={self.depth}: expected at least 1")
        if self.expansion <= 0:
            raise SpecError(f"regressor.expansion={self.expansion}: expected > 0")
        if self.eps <= 0:
            raise SpecError(f"regressor.eps={self.eps}: expected > 0")
        if self.weight_std is not None and self.weight_std < 0:
            raise SpecError(f"regressor.weight_std={self.weight_std}: expected >= 0, or null for fan_in^-1/2")
        if self.glu and self.depth != 2:
            raise SpecError(f"regressor.glu=true has depth 2 (a gated hidden layer and an output layer), got depth={self.depth}")

    def init(self, dk, dv) -> dict[str, Init]:
        hidden = max(1, round(self.expansion * dk))
        widths = [dk, *[hidden] * (self.depth - 1), dv]
        init = {}
        for i, (a, b) in enumerate(itertools.pairwise(widths), start=1):
            init[f"W{i}"] = normal(a, b, std=self.weight_std)
            if self.bias:
                init[f"b{i}"] = zeros(b)
        if self.glu:
            init["W3"] = normal(dk, hidden, std=self.weight_std)
            if self.bias:
                init["b3"] = zeros(hidden)
        if self.norm == "layer":
            init |= {"norm_weight": ones(dv), "norm_bias": zeros(dv)}
        return init

    def predict(self, w, x):
        act = ACTIVATIONS[self.activation]
        z = linear(x, w["W1"], w.get("b1"))
        if self.glu:
            z = linear(act(z) * linear(x, w["W3"], w.get("b3")), w["W2"], w.get("b2"))
        else:
            for i in range(2, self.depth + 1):
                z = linear(act(z), w[f"W{i}"], w.get(f"b{i}"))
        if self.norm == "layer":
            z = F.layer_norm(z, z.shape[-1:], eps=self.eps) * w["norm_weight"] + w["norm_bias"]
        return x + z if self.residual else z

    def layers(self):
        if self.glu or self.depth > 2:
            return None
        return Layers(self.residual, self.eps, self.activation if self.depth == 2 else None)

    def key_axis(self):
        return ("W1", "W3") if self.glu else ("W1",)

    def check_sizes(self, dk, dv):
        if self.residual and dk != dv:
            raise ValueError(
                f"regressor mlp with residual=true adds its input: it needs dk = dv, got dk={dk}, dv={dv} (of a layer, "
                "layer.expand_k and layer.expand_v make them)"
            )
