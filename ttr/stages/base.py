"""What a stage is: one step of a stream (q, k, v, write_key or output) between projection and regressor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..piece import Piece
from ..registry import STAGES, SpecError
from .call import Call


@dataclass(frozen=True, kw_only=True)
class StreamSize:
    """What a stage's module is built for: tensors [B, T, heads, width], one stream of one layer.

    name: the stream. key: where in the layer the stage stands, `q_0`. heads: of all micro-steps together. micro_steps:
    pairs per token. keys: [heads, width] of the keys that the memory sees. d_model, layer_idx, n_layers: of the layer.
    mini_batch: the declaration's.
    """

    name: str = ""
    key: str = ""
    heads: int = 1
    width: int = 1
    micro_steps: int = 1
    keys: tuple[int, int] = (1, 1)
    d_model: int = 0
    layer_idx: int = 0
    n_layers: int = 1
    mini_batch: int | str = 1


class StageModule(nn.Module):
    """The running form of a stage: [B, T, heads, width] -> [B, T, heads, width']."""

    history: int = 0  # earlier inputs it looks back at; the layer's state keeps them as `key`: [N, history, channels]
    key: str = ""
    channels: int = 0
    position: bool = False  # whether it needs to know how many tokens came before

    def forward(self, x: Tensor, call: Call) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, call)")

    def reset_parameters(self) -> None:
        """Initialise as published."""


class Map(StageModule):
    """A stage without parameters, memory or position: the declaration's own formula."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def forward(self, x, call):
        return self.stage(x)

    def extra_repr(self) -> str:
        return self.stage.kind


@dataclass(frozen=True, kw_only=True)
class Stage(Piece):
    """A frozen declaration; `build` makes the module that runs it in a layer.

    A stage that is a formula defines `__call__(x: [..., width]) -> [..., width']` and nothing else; one with
    parameters or memory overrides `build`.
    """

    registry: ClassVar = STAGES
    output_only: ClassVar[bool] = False

    def width(self, width: int) -> int:
        """The head width after this stage."""
        return width

    def build(self, size: StreamSize) -> StageModule:
        return Map(self)

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"stage {self.kind!r} must define __call__(x) or build(size)")

    def only_in(self, size: StreamSize, *streams: str) -> None:
        """Raise SpecError unless the stage stands in one of `streams`."""
        if size.name not in streams:
            raise SpecError(f"layer.{size.name}: stage {self.kind!r} belongs to {list(streams)}")
