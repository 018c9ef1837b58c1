"""What is measured on a split: accuracy by slice and how often an answer was outdated, or the relative error by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from experiments.tasks import IGNORE, Batch, Segment, VectorBatch, slice_name


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


class ErrorMetrics(torch.nn.Module):
    """`error`: the sum of squared errors over the sum of squared targets, of a split and of each segment.

    Answering zero has error one. `loss` is the mean squared error, which is not divided.
    """

    def __init__(self, segments: Sequence[Segment]):
        super().__init__()
        self.names = [segment.name for segment in segments]
        keys = ["error", *(f"error/{name}" for name in self.names)]
        self.squares = torch.nn.ModuleDict({key: SumMetric() for key in keys})
        self.powers = torch.nn.ModuleDict({key: SumMetric() for key in keys})
        self.loss = MeanMetric()

    def update(self, batch: VectorBatch, answers: Tensor) -> None:
        """Count one batch: answers [n, d_out] at its questions in order."""
        targets = batch.targets[batch.asked]
        squares, powers = (answers - targets).square(), targets.square()
        self.loss.update(squares)
        for key in ("error", f"error/{self.names[batch.segment]}"):
            cast(SumMetric, self.squares[key]).update(squares)
            cast(SumMetric, self.powers[key]).update(powers)

    def report(self, stage: str) -> dict[str, Tensor]:
        """{"STAGE/loss", "STAGE/error", "STAGE/error/SEGMENT"}; the count starts again."""
        values = {f"{stage}/loss": self.loss.compute()}
        for key in self.squares:
            values[f"{stage}/{key}"] = cast(SumMetric, self.squares[key]).compute() / cast(SumMetric, self.powers[key]).compute()
        for metric in (self.loss, *self.squares.values(), *self.powers.values()):
            cast(SumMetric, metric).reset()
        return values
