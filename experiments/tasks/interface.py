"""What a task's model reads, what it answers with, and how the answers are scored: tokens or vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """The figure that a task is judged by."""

    name: str  # as in logs, tables and results.csv
    best: str  # "max" or "min": which end is good


@dataclass(frozen=True)
class Tokens:
    """Tokens are read, tokens are the answers."""

    vocab_size: int
    score: ClassVar[Score] = Score("accuracy", best="max")

    @property
    def chance(self) -> float | None:
        return 2 / self.vocab_size  # half of the vocabulary are values

    def example(self, seq_len: int, generator: torch.Generator) -> Tensor:
        """Some input of one sequence."""
        return torch.randint(self.vocab_size, (1, seq_len), generator=generator)


@dataclass(frozen=True)
class Vectors:
    """Vectors of width `inputs` are read, vectors of width `outputs` are the answers."""

    inputs: int
    outputs: int
    score: ClassVar[Score] = Score("error", best="min")
    chance: ClassVar[float | None] = None

    def example(self, seq_len: int, generator: torch.Generator) -> Tensor:
        """Some input of one sequence."""
        return torch.randn(1, seq_len, self.inputs, generator=generator)


Interface = Tokens | Vectors
