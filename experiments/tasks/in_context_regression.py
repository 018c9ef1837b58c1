"""In-context regression: a function is drawn for every sequence and must be learned from the pairs that are shown.

    (x_1, y_1)  ...  (x_n, y_n)  |  (x'_1, ?)  ...  (x'_m, ?)        y_i = f(x_i), f new in every sequence

A pair is one vector [x | y | 0], a question is [x | 0 | 1], so nothing but the regression is left to learn: no pair has to
be put together from two positions. Answers are never shown.

Sources: Garg et al., "What Can Transformers Learn In-Context?", NeurIPS 2022 (arXiv 2208.01066), for the functions; von Oswald
et al., "Transformers Learn In-Context by Gradient Descent", ICML 2023 (arXiv 2212.07677), for pairs as one token, where linear
attention is one step of gradient descent. Departures: several questions a sequence, marked by a channel of their own; y
may have several channels, with |y|^2 / outputs one in the mean; the nonlinear function is steeper than the ReLU network of
Garg et al., which is half linear and a third a constant; no curriculum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from experiments.tasks.base import Segment
from experiments.tasks.interface import Vectors


class VectorBatch(NamedTuple):
    """Vectors and answers of `rows` examples; `segment` says which part of the split they come from."""

    inputs: Tensor  # [rows, T, d_in] float32
    targets: Tensor  # [rows, T, d_out] float32: the answer at each question, zero elsewhere
    asked: Tensor  # [rows, T] bool: where the questions are
    segment: int


@dataclass(frozen=True, kw_only=True)
class InContextRegression:
    """`pairs` pairs of a random function of x ~ N(0, I), then `questions`; the error is relative to answering zero.

    linear: y = W x, W ~ N(0, 1 / inputs). mlp: y = A tanh(W x + b) with `hidden` units, W ~ N(0, gain^2 / inputs),
    b ~ N(0, gain^2), A ~ N(0, 1 / hidden), scaled. The test is repeated for every number of pairs in `test_pairs`.
    """

    kind: str = "in_context_regression"
    function: Literal["linear", "mlp"] = "linear"
    inputs: int = 8
    outputs: int = 8
    pairs: int = 32
    questions: int = 16
    hidden: int = 16
    gain: float = 2.0
    examples: int | None = None  # of training; null: every batch is new
    test_pairs: list[int] = field(default_factory=list)  # empty: `pairs`
    test_examples: int = 1024

    @property
    def interface(self) -> Vectors:
        return Vectors(self.inputs + self.outputs + 1, self.outputs)

    def segments(self, split: str) -> list[Segment]:
        counts = [self.pairs] if split == "train" else self.test_pairs or [self.pairs]
        for name in ("inputs", "outputs", "questions", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.pairs, *counts) < 1 or len(set(counts)) < len(counts):
            raise ValueError(f"pairs and test_pairs must be at least 1 and no number listed twice, got {self.pairs} and {self.test_pairs}")
        return [
            Segment(
                name=f"n={pairs}",
                slices=("all",),
                seq_len=pairs + self.questions,
                examples=self.examples if split == "train" else self.test_examples,
                sample=functools.partial(_sample, self, pairs),
            )
            for pairs in counts
        ]


def _sample(task: InContextRegression, pairs: int, rows: int, generator: torch.Generator, segment: int) -> VectorBatch:
    x = torch.randn(rows, pairs + task.questions, task.inputs, generator=generator)
    y = FUNCTIONS[task.function](x, task, generator)
    asked = (torch.arange(pairs + task.questions) >= pairs).expand(rows, -1)
    shown = y.masked_fill(asked[:, :, None], 0.0)
    inputs = torch.cat([x, shown, asked[:, :, None].float()], dim=-1)
    return VectorBatch(inputs, y - shown, asked, segment)


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
