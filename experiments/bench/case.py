"""What a case is: one mechanism, the shapes it is measured at, and everybody's call on the same inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ttr
from experiments.bench.shapes import Shape
from ttr.kernels.triton.eligible import capability_of

COMPILED = "ttr-compiled"  # ours through torch.compile as a whole


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One contender's call on its inputs, and the tensors that gradients are taken of."""

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One mechanism. `who`: everybody who runs it, ours ("ttr") first; a peer, or a peer and how it is called ("fla-fused").

    shapes, more: measured by default, and with --extended. notes: beside the figures of one contender. remark: below the tables.
    """

    name: str
    title: str
    who: tuple[str, ...]
    shapes: tuple[Shape, ...]
    more: tuple[Shape, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""

    @abstractmethod
    def inputs(self, shape: Shape, *, requires_grad: bool, device: str = "cuda") -> Any:
        """Random inputs of a seed of their own, the same for everybody; `like_output` is a tensor shaped as the outputs."""

    @abstractmethod
    def contender(self, who: str, x: Any) -> Contender:
        """The whole sequence, called as its user does with its own defaults."""

    def compared(self, who: str, o: Tensor, x: Any) -> Tensor | None:
        """What of an output should equal the others', or None where they compute different functions."""
        return o

    def floor_bytes(self, shape: Shape, kind: str) -> int | None:
        """The bytes that a call cannot avoid to move, where they bound its time."""
        return None

    def flops(self, shape: Shape, kind: str) -> float | None:
        """Operations of the large matmuls, where they bound the time."""
        return None

    def counts_memory(self, who: str) -> bool:
        """Whether what a call allocates is all the memory that it takes."""
        return True

    def note(self, who: str, shape: Shape) -> str:
        return self.notes.get(who, "")


def path_note(spec: ttr.Spec, shape: Shape) -> str:
    """Which path `auto` takes in bf16 on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known: dict[str, Any] = {"dtype": torch.bfloat16, "dk": shape.dk, "dv": shape.dv, "capability": capability_of(device)}
    return f"path {ttr.select_path(spec, length=shape.T, device=device, **known)[0]}"
