"""What an inner optimizer is: three pure functions over its slots.

    point(z, s)       where the gradient is taken        (default: the weights, z[0])
    update(z, g, s)   the new slots
    read(z, s)        the weights that the query sees     (default: z[0])

z is a tuple of tensors of one shape, z[0] the weights; `s` holds the token's signals as attributes (s.step, ...).
A `linear=True` optimizer is linear in (z, g): lowering probes the three functions, so nothing is written twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..operands import product
from ..piece import Piece
from ..registry import OPTIMIZERS, SpecError
from ..signals import Signal, signal
from .mirrors import Mirror, NoMirror
from .step_rules import Plain, StepRule

Slots = tuple[Tensor, ...]


class Signals:
    """A token's signal values by attribute; naming one that was not declared says which exist.

    operands: of `product`, with which an optimizer multiplies large matrices: bf16 where the caller's tensors are, or None.
    """

    def __init__(self, values: dict[str, Tensor], operands: torch.dtype | None = None):
        self._values, self._operands = values, operands

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise SpecError(f"signal {name!r} is not declared; there are {sorted(self._values)}")
        return self._values[name]

    def replace(self, **values) -> Signals:
        return Signals({**self._values, **values}, self._operands)

    def by_name(self) -> dict[str, Tensor]:
        return dict(self._values)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in a's dtype, with bf16 operands where the call has them."""
        return product(a, b, self._operands)


@dataclass(frozen=True, kw_only=True)
class Solver(Piece):
    """A way to solve the normal equations of `least_squares` at the read."""

    registry: ClassVar = OPTIMIZERS

    def check(self, spec):
        if spec.regressor.kind != "least_squares":
            raise SpecError(
                f"optimizer={self.kind!r} solves the normal equations of regressor least_squares, got regressor={spec.regressor.kind!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Optimizer(Piece):
    """A first-order rule.

    step_rule: plain | nlms | implicit. mirror: none | norm | softmax, the weights that predict as a map of those that are
    stored. steps: micro-steps per token, each with its own (k, v, step); the gate acts
    before the first. pairs: `shared` repeats one (k, v). mini_batch: tokens whose gradients are taken at the same
    weights. accumulate: one update per mini-batch on the weighted sum. position: the reader's factor on what was
    gathered since the mini-batch began (TTT). write_key: `separate` splits the gradient of
    1/2 ||f(k)||^2 - <f(k_w), v>: `step` acts on the first term, the write strength is in k_w (RWKV-7).
    """

    registry: ClassVar = OPTIMIZERS
    linear: ClassVar[bool] = False
    slots: ClassVar[tuple[str, ...]] = ()  # names of z[1:]
    decayed: ClassVar[tuple[str, ...]] = ("weights",)  # what the gate decays

    step: Signal = signal(1.0)
    step_rule: StepRule = Plain()
    mirror: Mirror = NoMirror()
    steps: int = 1
    pairs: Literal["separate", "shared"] = "separate"
    mini_batch: int | Literal["sequence"] = 1
    accumulate: bool = False
    position: Literal["none", "mean", "learned"] = "none"
    write_key: Literal["same", "separate"] = "same"

    def __post_init__(self):
        for name, low in (("steps", 1), ("mini_batch", 1)):
            value = getattr(self, name)
            if isinstance(value, int) and value < low:
                raise SpecError(f"optimizer.{name}={value}: expected at least {low}")
        if self.pairs == "shared" and self.steps == 1:
            object.__setattr__(self, "pairs", "separate")  # one pair per token either way
        if self.mirror.identity:
            object.__setattr__(self, "mirror", NoMirror())

    def init_slots(self, w: Tensor) -> tuple[Tensor, ...]:
        """z[1:] before the first token."""
        return tuple(torch.zeros_like(w) for _ in self.slots)

    def point(self, z: Slots, s: Signals) -> Tensor:
        return z[0]

    def update(self, z: Slots, g: Tensor, s: Signals) -> Slots:
        raise NotImplementedError(f"optimizer {self.kind!r} must define update(z, g, s)")

    def read(self, z: Slots, s: Signals) -> Tensor:
        return z[0]

    def updated(self, z: Slots, g: Tensor, s: Signals) -> Slots:
        """`update`; raises SpecError where it does not return a tuple of as many tensors as there are slots."""
        new, expected = self.update(z, g, s), ("weights", *self.slots)
        if not isinstance(new, tuple) or len(new) != len(expected):
            got = f"{len(new)} slots" if isinstance(new, tuple) else type(new).__name__
            raise SpecError(f"optimizer {self.kind!r}: update returned {got}, expected a tuple of {len(expected)}: {expected}")
        return new

    def decayed_slots(self) -> tuple[bool, ...]:
        return tuple(name in self.decayed for name in ("weights", *self.slots))

    def check(self, spec):
        from ..lowering import check_superposition

        if self.linear:
            check_superposition(self)
        linear = spec.regressor.linear
        for name, s in self.signals().items():
            if s.value is not None and not math.isfinite(s.value):
                raise SpecError(f"optimizer.{name}={s.value}: expected a finite number")
            if s.per == "window":
                raise SpecError(f"optimizer.{name}.per='window': a step has no pairs to choose from; that is objective.window_weight")
            if s.per in ("key", "value") and not linear:
                raise SpecError(
                    f"optimizer.{name}.per={s.per!r} needs regressor linear: {spec.regressor.kind!r} has no single {s.per} axis"
                )
        if self.step_rule.kind != "plain" and not (linear and spec.objective.quadratic):
            raise SpecError(
                f"optimizer.step_rule={self.step_rule.kind!r} needs regressor linear and objective dot or l2 "
                f"(its step has a closed form only there), got {spec.regressor.kind!r} and {spec.objective.kind!r}"
            )
        if not self.mirror.identity:
            if self.step_rule.kind != "plain":
                raise SpecError(
                    f"optimizer.step_rule={self.step_rule.kind!r} solves for weights that predict as they are stored, "
                    f"which mirror={self.mirror.kind!r} changes; use step_rule plain"
                )
            if spec.read.normalizer != "none":
                raise SpecError(
                    f"optimizer.mirror={self.mirror.kind!r} would map the value channel that read.normalizer adds with the others; "
                    "use read.normalizer none"
                )
        if self.accumulate:
            if self.mini_batch == 1:
                raise SpecError("optimizer.accumulate=true needs mini_batch > 1: it makes one step per mini-batch")
            if self.mini_batch == "sequence":
                raise SpecError("optimizer.accumulate=true with mini_batch='sequence' would never step: the mini-batch never ends")
            if spec.read.at != "before":
                raise SpecError(
                    "optimizer.accumulate=true needs read=before: reading after the step would show a token the rest of its mini-batch"
                )
        if self.write_key == "separate":
            if not (linear and self.linear and spec.objective.kind == "l2"):
                raise SpecError(
                    "optimizer.write_key='separate' splits the gradient of 1/2||f(k)||^2 - <f(k_w), v>: "
                    "it needs regressor linear, objective l2 and a linear optimizer"
                )
            if self.step_rule.kind == "implicit" or self.accumulate:
                other = "accumulate" if self.accumulate else "step_rule='implicit'"
                raise SpecError(
                    f"optimizer.write_key='separate' with {other} has no closed form; use step_rule plain or nlms without accumulate"
                )
        if self.position != "none":
            if not (isinstance(self.mini_batch, int) and self.mini_batch > 1):
                raise SpecError(f"optimizer.position={self.position!r} needs mini_batch to be a number > 1, got {self.mini_batch!r}")
            if self.slots or self.accumulate or spec.gate.kind != "none" or spec.read.at != "after":
                raise SpecError(
                    f"optimizer.position={self.position!r} scales what was gathered since the mini-batch began; "
                    "it needs sgd or delta, no gate, no accumulate and read=after"
                )
