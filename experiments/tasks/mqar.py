"""Multi-query associative recall as published, and its forgetting variant.

Source: Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", ICLR 2024
(github.com/HazyResearch/zoology, multiquery_ar.py and forgetting_mqar.py). Two departures: `passes` above 1 works, and
an update of the forgetting variant always differs from the first value (there the comparison was made with the
value of another key).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from experiments.tasks.base import Segment
from experiments.tasks.interface import Tokens
from experiments.tasks.recall import check_sizes, recall_examples


@dataclass(frozen=True, kw_only=True)
class MQARSegment:
    """`examples` sequences of length `seq_len` with `pairs` key-value pairs, written `passes` times."""

    seq_len: int
    pairs: int
    examples: int
    passes: int = 1

    def sizes(self) -> dict[str, int]:
        return {"seq_len": self.seq_len, "pairs": self.pairs, "passes": self.passes}

    def name(self) -> str:
        passes = f" passes={self.passes}" if self.passes > 1 else ""
        return f"n={self.pairs}{passes} T={self.seq_len}"


@dataclass(frozen=True, kw_only=True)
class ForgettingSegment(MQARSegment):
    """The same, and then `updates` of the keys are written again with another value."""

    updates: int

    def sizes(self) -> dict[str, int]:
        return super().sizes() | {"updates": self.updates}

    def name(self) -> str:
        return f"{super().name()} u={self.updates}"


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """Pairs, then each key asked once, the gaps following a power law; accuracy by number of pairs."""

    kind: str = "mqar"
    vocab_size: int = 8192
    power: float = 0.01  # slot s is drawn with weight (s + 1)^(power - 1)
    fill: bool = True  # random tokens between the queries
    train: list[MQARSegment] = field(default_factory=list)
    val: list[MQARSegment] = field(default_factory=list)  # empty: the test segments, other examples
    test: list[MQARSegment] = field(default_factory=list)

    @property
    def interface(self) -> Tokens:
        return Tokens(self.vocab_size)

    def segments(self, split: str) -> list[Segment]:
        listed = {"train": self.train, "val": self.val or self.test, "test": self.test}[split]
        if not listed:
            raise ValueError(f"task.{split} lists no segment; give e.g. [{{seq_len: 64, pairs: 4, examples: 1000}}]")
        segments = [self._segment(segment) for segment in listed]
        names = [segment.name for segment in segments]
        if split != "train" and len(set(names)) < len(names):
            raise ValueError(f"task.{split} lists a segment twice: {names}; its slices could not be told apart")
        return segments

    def _segment(self, segment: MQARSegment) -> Segment:
        sizes: dict[str, Any] = {"vocab_size": self.vocab_size, **segment.sizes()}
        check_sizes(**{"updates": 0, **sizes})
        options = {**sizes, "power": self.power, "fill": self.fill}
        return Segment(
            name=segment.name(),
            slices=update_slices(segment.pairs, sizes.get("updates", 0)),
            seq_len=segment.seq_len,
            examples=segment.examples,
            sample=functools.partial(_sample, options),
        )


@dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(MQAR):
    """MQAR whose keys are partly rewritten: the label is the last value; accuracy on updated and on kept keys."""

    kind: str = "forgetting_mqar"
    train: list[ForgettingSegment] = field(default_factory=list)  # type: ignore[assignment]
    val: list[ForgettingSegment] = field(default_factory=list)  # type: ignore[assignment]
    test: list[ForgettingSegment] = field(default_factory=list)  # type: ignore[assignment]


def update_slices(pairs: int, updates: int) -> tuple[str, ...]:
    if updates == 0:
        return ("all",)
    return ("updated",) if updates == pairs else ("updated", "kept")


def _sample(options: dict[str, Any], rows: int, generator: Any, segment: int) -> Any:
    return recall_examples(rows, generator, segment=segment, **options)
