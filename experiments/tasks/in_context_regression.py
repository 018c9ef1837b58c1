"""In-context regression: a function is drawn for every sequence and must be learned from the pairs before each question.

    x_1  y_1  x_2  y_2  ...  x_n  y_n        y_i = f(x_i), f new in every sequence

Every vector is a position of its own, [x | 0] or [0 | y]. The answer to x_i is asked for at x_i's own position, before
y_i is shown, so the first answer can only be a guess and every later one has one pair more to go by.

Source of the task and its layout: Garg et al., "What Can Transformers Learn In-Context?", NeurIPS 2022 (arXiv 2208.01066).
Departures: y may have several channels, weights are scaled for |y|^2 / outputs to be one in the mean, the nonlinear function
is steeper than their ReLU network, which is half linear and a third a constant, and there is no curriculum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from experiments.tasks.base import Segment
from experiments.tasks.interface import Vectors

SLICES = 4  # the questions of a sequence are reported in as many parts, first to last


class VectorBatch(NamedTuple):
    """Vectors and answers of `rows` examples; `segment` says which part of the split they come from."""

    inputs: Tensor  # [rows, T, d_in] float32
    targets: Tensor  # [rows, T, d_out] float32: the answer at each question, zero elsewhere
    slices: Tensor  # [rows, T] int64: which of the segment's slices a question belongs to, -1 where nothing is asked
    segment: int


@dataclass(frozen=True, kw_only=True)
class InContextRegression:
    """`pairs` pairs of a random function of x ~ N(0, I); error relative to answering zero, by number of pairs seen.

    linear: y = W x, W ~ N(0, 1 / inputs). mlp: y = A tanh(W x + b) with `hidden` units, W ~ N(0, gain^2 / inputs),
    b ~ N(0, gain^2), A ~ N(0, 1 / hidden), scaled.
    """

    kind: str = "in_context_regression"
    function: Literal["linear", "mlp"] = "linear"
    inputs: int = 8
    outputs: int = 1
    pairs: int = 32
    hidden: int = 8
    gain: float = 2.0
    examples: int | None = None  # of training; null: every batch is new
    test_examples: int = 1024

    @property
    def interface(self) -> Vectors:
        return Vectors(self.inputs + self.outputs, self.outputs)

    def segments(self, split: str) -> list[Segment]:
        for name in ("inputs", "outputs", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pairs < SLICES or self.pairs % SLICES:
            raise ValueError(f"pairs must be a multiple of {SLICES}, the parts that are reported, got {self.pairs}")
        part = self.pairs // SLICES
        return [
            Segment(
                name=f"n={self.pairs}",
                slices=tuple(f"after {i * part}-{(i + 1) * part - 1}" for i in range(SLICES)),
                seq_len=2 * self.pairs,
                examples=self.examples if split == "train" else self.test_examples,
                sample=functools.partial(_sample, self),
            )
        ]


def _sample(task: InContextRegression, rows: int, generator: torch.Generator, segment: int) -> VectorBatch:
    x = torch.randn(rows, task.pairs, task.inputs, generator=generator)
    y = FUNCTIONS[task.function](x, task, generator)
    inputs = torch.zeros(rows, 2 * task.pairs, task.inputs + task.outputs)
    inputs[:, 0::2, : task.inputs] = x
    inputs[:, 1::2, task.inputs :] = y
    targets = torch.zeros(rows, 2 * task.pairs, task.outputs)
    targets[:, 0::2] = y
    slices = torch.full((rows, 2 * task.pairs), -1)
    slices[:, 0::2] = torch.arange(task.pairs) // (task.pairs // SLICES)
    return VectorBatch(inputs, targets, slices, segment)


def linear(x: Tensor, task: InContextRegression, generator: torch.Generator) -> Tensor:
    """x [rows, n, inputs] -> y [rows, n, outputs], one W per row."""
    return x @ torch.randn(len(x), task.inputs, task.outputs, generator=generator) / task.inputs**0.5


def mlp(x: Tensor, task: InContextRegression, generator: torch.Generator) -> Tensor:
    """As `linear`, one network per row."""
    weight = task.gain * torch.randn(len(x), task.inputs, task.hidden, generator=generator) / task.inputs**0.5
    bias = task.gain * torch.randn(len(x), 1, task.hidden, generator=generator)
    out = torch.randn(len(x), task.hidden, task.outputs, generator=generator) / task.hidden**0.5
    return torch.tanh(x @ weight + bias) @ out / _mean_square_of_tanh(task.gain) ** 0.5


@functools.cache
def _mean_square_of_tanh(gain: float) -> float:
    """E tanh(z)^2 for z ~ N(0, 2 gain^2), by the midpoint rule."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    return float((torch.tanh(2**0.5 * gain * z).square() * density).sum() / density.sum())


FUNCTIONS = {"linear": linear, "mlp": mlp}
