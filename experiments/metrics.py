"""Accuracy by slice: over all keys, over rewritten and kept ones, and how often the answer was the outdated value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from experiments.tasks import IGNORE, Batch, Segment, slice_name


class SliceMetrics(torch.nn.Module):
    """Means over a split. `accuracy` is the mean over examples of each example's accuracy, as the tasks were published.

    Every answer counts alike (micro averaging): a mean over the classes would weigh values by how rarely they occur.
    """

    def __init__(self, segments: Sequence[Segment]):
        super().__init__()
        self.segments = list(segments)
        self.names = [[slice_name(s, kind, len(segments) == 1) for kind in s.slices] for s in segments]
        keys = ["loss", "accuracy"] + [f"accuracy/{name}" for names in self.names for name in names]
        for names, segment in zip(self.names, segments, strict=True):
            keys += [f"old/{name}" for name, kind in zip(names, segment.slices, strict=True) if kind == "updated"]
        self.means = torch.nn.ModuleDict({key: MeanMetric() for key in keys})

    def _mean(self, key: str) -> MeanMetric:
        return cast(MeanMetric, self.means[key])

    def update(self, batch: Batch, answers: Tensor, losses: Tensor) -> None:
        """Count one batch: `answers` and `losses`, each [n], at its labelled positions in order."""
        at = batch.labels != IGNORE
        labels, stale = batch.labels[at], batch.stale[at]
        right = (answers == labels).float()
        self._mean("loss").update(losses)
        self._mean("accuracy").update(right.view(len(batch.tokens), -1).mean(dim=1))  # every row has as many queries
        updated = stale != IGNORE
        masks = {"all": torch.ones_like(updated), "updated": updated, "kept": ~updated}
        for kind, name in zip(self.segments[batch.segment].slices, self.names[batch.segment], strict=True):
            self._mean(f"accuracy/{name}").update(right[masks[kind]])
            if kind == "updated":
                self._mean(f"old/{name}").update((answers == stale)[updated].float())

    def report(self, stage: str) -> dict[str, Tensor]:
        """{"STAGE/loss", "STAGE/accuracy", "STAGE/accuracy/SLICE", "STAGE/old/SLICE"}; the count starts again."""
        values = {f"{stage}/{key}": self._mean(key).compute() for key in self.means}
        for key in self.means:
            self._mean(key).reset()
        return values
