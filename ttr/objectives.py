"""Inner objectives: the loss one (k, v) pair puts on the regressor's prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .constant import constant
from .piece import Piece
from .registry import OBJECTIVES, SpecError, objective
from .signals import Signal, signal


@dataclass(frozen=True, kw_only=True)
class Objective(Piece):
    """A loss on (prediction, target); `quadratic=True` promises a gradient affine in both, which lowering probes."""

    registry: ClassVar = OBJECTIVES
    quadratic: ClassVar[bool] = False

    def loss(self, prediction: Tensor, target: Tensor, s) -> Tensor:
        """prediction, target: [dv] -> scalar; `s` holds the token's signals."""
        raise NotImplementedError(f"objective {self.kind!r} must define loss(prediction, target, s)")

    def check(self, spec):
        own = {name: s for name, s in self.signals().items() if name != "window_weight"}  # which weighs losses, and is in none
        for name, s in own.items():
            if s.per not in ("head", "value"):
                raise SpecError(
                    f"objective.{name}.per={s.per!r}: a loss sees predictions, which have no {s.per} axis; choose from ['head', 'value']"
                )
        if self.quadratic and own:
            raise SpecError(
                f"objective {self.kind!r} says quadratic=True, but has the signals {sorted(own)}: its slopes are probed once for all tokens"
            )
        if self.quadratic:
            slopes(self, 3)


@constant
def slopes(objective: Objective, dv: int) -> tuple[float, float]:
    """Probe dL/dprediction = curvature * prediction - gain * target of a quadratic objective on dv channels."""
    # forward mode: nothing is saved for backward, so activation checkpointing around a layer sees nothing of it
    gradient = torch.func.jacfwd(lambda p, v: objective.loss(p, v, None))
    one, zero = torch.ones(dv, dtype=torch.float64), torch.zeros(dv, dtype=torch.float64)
    curvature, gain = gradient(one, zero), -gradient(zero, one)
    x = torch.linspace(-2, 3, dv, dtype=torch.float64)
    y = torch.linspace(1, -4, dv, dtype=torch.float64)
    affine = all(
        torch.allclose(gradient(a * x, a * y), a * (curvature * x - gain * y)) for a in (1e-3, 1.0, 1e3)
    )  # a kink may lie anywhere
    if not affine or (curvature != curvature[0]).any() or (gain != gain[0]).any():
        raise SpecError(f"objective {objective.kind!r} says quadratic=True, but its gradient is not curvature*prediction - gain*target")
    return float(curvature[0]), float(gain[0])


@objective("dot")
@dataclass(frozen=True, kw_only=True)
class Dot(Objective):
    """-<f(k), v>: what linear attention descends."""

    quadratic: ClassVar[bool] = True

    def loss(self, prediction, target, s):
        return -(prediction * target).sum()


@objective("l2")
@dataclass(frozen=True, kw_only=True)
class L2(Objective):
    """1/2 ||f(k) - v||^2, summed or averaged over value channels; one sgd step on it is the delta rule.

    window: c > 1 makes a token's loss sum_(l < c) window_weight_l l(k_(t-l), v_(t-l)), of its own pair and the c - 1 before
    it, all predicted by the weights of now; a signal per window has one number for each, the token's own first. The last
    c - 1 pairs are part of the state. Source: the Omega rule of Atlas (2505.23735), from secondary transcripts.
    """

    quadratic: ClassVar[bool] = True
    reduce: Literal["sum", "mean"] = "sum"
    window: int = 1
    window_weight: Signal = signal(1.0)

    def __post_init__(self):
        if self.window < 1:
            raise SpecError(f"objective.window={self.window}: expected at least 1, the token's own pair")
        if self.window == 1 and self.window_weight != Signal(value=1.0):
            raise SpecError("objective.window_weight weighs the pairs of a window: it needs objective.window > 1")

    def signals(self):
        return {name: s for name, s in super().signals().items() if name != "window_weight" or self.window > 1}

    def check(self, spec):
        super().check(spec)
        if self.window == 1:
            return
        if not (self.window_weight.constant or self.window_weight.per == "window"):
            raise SpecError(
                f"objective.window_weight.per={self.window_weight.per!r}: it has a number for each pair of the window; use per window"
            )
        if spec.regressor.family != "trained":
            raise SpecError(
                f"objective.window={self.window} sums gradients, and regressor={spec.regressor.kind!r} takes none; it has every pair"
            )
        optimizer = spec.optimizer
        said = {
            "optimizer.steps": (spec.steps, 1), "optimizer.write_key": (optimizer.write_key, "same"),
            "optimizer.step_rule": (optimizer.step_rule.kind, "plain"), "read.normalizer": (spec.read.normalizer, "none"),
        }  # fmt: skip
        for key, (got, expected) in said.items():
            if got != expected:
                raise SpecError(
                    f"objective.window={self.window} makes one gradient of several pairs: it needs {key}={expected!r}, got {got!r}"
                )

    def loss(self, prediction, target, s):
        squared = 0.5 * (prediction - target).square()
        return squared.sum() if self.reduce == "sum" else squared.mean()


@objective("huber")
@dataclass(frozen=True, kw_only=True)
class Huber(Objective):
    """h of the error e = f(k) - v, squared up to the threshold and linear beyond: of its channels, its length, or a mixture.

    channel: sum_c h(e_c), h(x) = x^2/2 if |x| <= threshold else threshold (|x| - threshold/2)
    length:  h(||e||)
    mixture: ||e||^2/2 if ||e|| <= threshold else threshold (||e||_1 - threshold/2)

    On one channel the three are one; `mixture` jumps at the threshold on several. Source: MIRAS (2504.13173), the three
    forms of its robust loss, as secondary transcripts have them; YAAD is said to use the mixture.
    """

    threshold: Signal = signal(1.0)
    over: Literal["channel", "length", "mixture"] = "channel"

    def check(self, spec):
        super().check(spec)
        if self.threshold.value is not None and not self.threshold.value > 0:
            raise SpecError(f"objective.threshold={self.threshold.value}: expected > 0")
        if self.over != "channel" and self.threshold.per == "value":
            raise SpecError(f"objective.threshold.per='value': over={self.over!r} compares the length of the whole error; use per head")

    def loss(self, prediction, target, s):
        error = prediction - target
        if self.over == "channel":
            return _huber(error.abs(), s.threshold).sum()
        squares = error.square().sum()
        within = squares <= s.threshold.square()
        # what is not taken has a gradient too: of sqrt(0) and of an infinite threshold it would be NaN
        far = torch.where(within, torch.ones_like(squares), squares)
        if self.over == "length":
            return torch.where(within, 0.5 * squares, _huber(far.sqrt(), s.threshold)).sum()
        threshold = torch.where(within, torch.ones_like(s.threshold), s.threshold)
        return torch.where(within, 0.5 * squares, threshold * (error.abs().sum() - 0.5 * threshold)).sum()


def _huber(size: Tensor, threshold: Tensor) -> Tensor:
    """h of sizes >= 0; right for an infinite threshold too."""
    inside = size.clamp(max=threshold)
    return inside * (size - 0.5 * inside)


@objective("lp")
@dataclass(frozen=True, kw_only=True)
class Lp(Objective):
    """1/p sum_c |f(k)_c - v_c|^p, p > 1; the attentional bias of MONETA in MIRAS (2504.13173) at p = 3.

    smooth: |x| is sqrt(x^2 + smooth). sign_scale: the gradient is tanh(sign_scale x) |x|^(p-1) instead of the loss's own,
    sign(x) |x|^(p-1), as MIRAS is said to smooth it (secondary transcripts: 1e-6 and about 10).
    """

    p: float = 3.0
    smooth: float = 0.0
    sign_scale: float | None = None

    def __post_init__(self):
        if not 1 < self.p < math.inf:
            raise SpecError(f"objective.p={self.p}: expected 1 < p < inf (the gradient must exist, at zero error too)")
        if self.smooth < 0:
            raise SpecError(f"objective.smooth={self.smooth}: expected >= 0")
        if self.sign_scale is not None and not self.sign_scale > 0:
            raise SpecError(f"objective.sign_scale={self.sign_scale}: expected > 0, or null for the sign itself")

    def loss(self, prediction, target, s):
        error = prediction - target
        size = (error.square() + self.smooth).sqrt() if self.smooth else error.abs()
        loss = size.pow(self.p) / self.p
        if self.sign_scale is not None:
            loss = WithSlope.apply(error, loss, torch.tanh(self.sign_scale * error) * size.pow(self.p - 1))
        return loss.sum()


class WithSlope(torch.autograd.Function):
    """The value of `loss` whose derivative in x is `slope`, elementwise; the slope is differentiated further as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, *gradients):
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None
