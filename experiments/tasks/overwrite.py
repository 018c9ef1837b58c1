"""Overwrite recall: keys that are assigned a second value must be answered with it.

The smallest task that tells the inner rules apart. Weighting all pairs alike averages the old and the new value;
forgetting favours the new one; an online regression corrects the memory towards it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from experiments.tasks.base import Segment
from experiments.tasks.interface import Tokens
from experiments.tasks.mqar import _sample, update_slices
from experiments.tasks.recall import check_sizes


@dataclass(frozen=True, kw_only=True)
class Overwrite:
    """`pairs` pairs, then `updates` of the keys rewritten in random order, then every key asked, in random slots.

    Unlike the published tasks the fillers are one token of their own, so every label is unambiguous, and the slots are
    uniform, so the position of a query says nothing about its answer. `updates` = `pairs` rewrites every key.
    """

    kind: str = "overwrite"
    vocab_size: int = 256
    seq_len: int = 64
    pairs: int = 8
    updates: int = 8
    examples: int | None = None  # of training; null: every batch is new
    test_examples: int = 1024

    @property
    def interface(self) -> Tokens:
        return Tokens(self.vocab_size)

    def segments(self, split: str) -> list[Segment]:
        sizes = {"seq_len": self.seq_len, "pairs": self.pairs, "updates": self.updates, "passes": 1}
        check_sizes(vocab_size=self.vocab_size, **sizes)
        options = {**sizes, "vocab_size": self.vocab_size, "power": 1.0, "fill": False}
        return [
            Segment(
                name=f"n={self.pairs} T={self.seq_len}",
                slices=update_slices(self.pairs, self.updates),
                seq_len=self.seq_len,
                examples=self.examples if split == "train" else self.test_examples,
                sample=functools.partial(_sample, options),
            )
        ]
