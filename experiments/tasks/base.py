"""What a task is to the rest of the package, and the data module that serves any of them.

A split is a list of segments walked in the listed order, never shuffled or mixed (an implicit curriculum where
the segments grow). Every batch is a pure function of (seed, split, step): rows are made in blocks, and each block
has a generator of its own, so no run, batch size or restart changes an example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.tasks.interface import Interface

BLOCK = 1024  # rows made at once; part of what a seed means, so not an option
CACHE_BYTES = 2**28  # blocks kept in memory by a split, for segments that are walked more than once


@dataclass(frozen=True)
class Segment:
    """One homogeneous part of a split: `sample(rows, generator, segment index)` draws its examples."""

    name: str  # as it appears in tables, e.g. "n=4 T=64"
    slices: tuple[str, ...]  # subset of ("all", "updated", "kept") that occurs in it
    seq_len: int
    examples: int | None  # None: endless, every batch is new
    sample: Callable[[int, torch.Generator, int], Any]  # a named tuple: tensors [rows, T, ...], inputs first, then `segment`


class Task(Protocol):
    """A frozen dataclass of sizes; its fields are the keys of the `task` section of a config."""

    @property
    def kind(self) -> str: ...

    @property
    def interface(self) -> Interface:
        """What is read, what is answered, and how that is scored."""
        ...

    def segments(self, split: str) -> list[Segment]:
        """The segments of "train", "val" or "test", in the order in which they are walked."""
        ...


def slice_name(segment: Segment, kind: str, alone: bool) -> str:
    """The name of a slice in tables and logs; a lone segment needs no name of its own beside updated / kept."""
    if kind == "all":
        return segment.name
    return kind if alone else f"{segment.name} {kind}"


def slice_names(segments: Sequence[Segment]) -> list[str]:
    return [slice_name(segment, kind, len(segments) == 1) for segment in segments for kind in segment.slices]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any labels: neighbouring labels give unrelated generators."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Split(Dataset[Any]):
    """Batch number `step` of one split; steps beyond one epoch walk the same segments again."""

    def __init__(self, segments: Sequence[Segment], *, split: str, seed: int, batch_size: int):
        if any(segment.examples is None for segment in segments) and len(segments) > 1:
            raise ValueError(f"{split}: an endless segment (examples: null) must be the only one, got {len(segments)}")
        self.segments, self.split, self.seed, self.batch_size = list(segments), split, seed, batch_size
        self._blocks: dict[tuple[int, int], Any] = {}
        self._cached_bytes = 0

    def steps_per_epoch(self) -> int | None:
        """Batches in one walk through the segments; None for an endless split."""
        counts = [segment.examples for segment in self.segments]
        if None in counts:
            return None
        return sum(-(-count // self.batch_size) for count in counts if count is not None)

    def __getitem__(self, step: int) -> Any:
        epoch_steps = self.steps_per_epoch()
        if epoch_steps is None:
            return self._rows(0, step * self.batch_size, (step + 1) * self.batch_size)
        step %= epoch_steps
        for index, segment in enumerate(self.segments):
            assert segment.examples is not None
            batches = -(-segment.examples // self.batch_size)
            if step < batches:
                start = step * self.batch_size
                return self._rows(index, start, min(start + self.batch_size, segment.examples))
            step -= batches
        raise AssertionError("unreachable: step is below the epoch's length")

    def _rows(self, index: int, start: int, stop: int) -> Any:
        parts: list[Any] = []
        batch_type: Any = None
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            rows = self._block(index, block)
            batch_type = type(rows)
            part = slice(max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK))
            parts.append([tensor[part] for tensor in rows[:-1]])
        tensors = (_cast(torch.cat(tensors), torch.int32, torch.int64) for tensors in zip(*parts, strict=True))
        return batch_type(*tensors, segment=index)

    def _block(self, index: int, block: int) -> Any:
        key = (index, block)
        if key not in self._blocks:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.split, index, block))
            made = self.segments[index].sample(BLOCK, generator, index)
            made = type(made)(*(_cast(tensor, torch.int64, torch.int32) for tensor in made[:-1]), segment=index)
            if self.steps_per_epoch() is None:
                self._blocks.clear()  # an endless split is walked forwards: only the newest block is needed
            elif self._cached_bytes > CACHE_BYTES:
                return made
            self._blocks[key] = made
            self._cached_bytes += sum(tensor.nbytes for tensor in made[:-1])
        return self._blocks[key]


def _cast(tensor: Tensor, source: torch.dtype, target: torch.dtype) -> Tensor:
    """Integers are kept at half their size; everything else stays as it is."""
    return tensor.to(target) if tensor.dtype == source else tensor


class StepLoader:
    """Batches first .. steps - 1 of a split, resumable: its state is the number of batches handed out.

    Lightning saves and restores that state with a checkpoint, so a run interrupted anywhere goes on with the very
    batch it would have seen next. `len` stays the whole length, as Lightning expects of a resumed loader.
    """

    def __init__(self, split: Split, steps: int, workers: int = 0):
        self.split, self.steps, self.workers = split, steps, workers
        self._handed_out = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        order = range(self._handed_out, self.steps)
        loader = DataLoader(self.split, batch_size=None, sampler=order, num_workers=self.workers)
        for batch in loader:
            self._handed_out += 1
            yield batch
        self._handed_out = 0

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self._handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._handed_out = state["handed_out"]


class TaskData(LightningDataModule):
    """The three splits of a task as Lightning wants them."""

    def __init__(self, task: Task, *, seed: int, steps: int, batch_size: int, test_batch_size: int = 256, workers: int = 0):
        super().__init__()
        self.task, self.seed, self.steps, self.workers = task, seed, steps, workers
        self.batch_sizes = {"train": batch_size, "val": test_batch_size, "test": test_batch_size}

    def split(self, name: str) -> Split:
        # val and test come from a seed of their own: every seed and every mixer is judged on the same examples
        seed = self.seed if name == "train" else 0
        return Split(self.task.segments(name), split=name, seed=seed, batch_size=self.batch_sizes[name])

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self.split("train"), self.steps, self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._whole("test")

    def _whole(self, name: str) -> DataLoader[Any]:
        split = self.split(name)
        steps = split.steps_per_epoch()
        if steps is None:
            raise ValueError(f"task {self.task.kind}: the {name} split needs a number of examples, got null")
        return DataLoader(split, batch_size=None, sampler=range(steps))
