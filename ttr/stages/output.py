"""Stages of the output stream: the gate, and what reaches the output without passing through the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ..registry import SpecError, stage
from ..signals import Signal, signal
from .base import Stage, StageModule


@stage("gate")
@dataclass(frozen=True, kw_only=True)
class OutputGate(Stage):
    """o * g, g a signal (map `silu`, per value channel, unless declared otherwise); it is projected by the layer."""

    output_only: ClassVar[bool] = True
    inline_signal: ClassVar[str] = "gate_signal"
    gate_signal: Signal = signal("silu", per="value")

    def __post_init__(self):
        if self.gate_signal.constant:
            raise SpecError(f"gate.value={self.gate_signal.value}: an output gate is projected from the input; expected a map")
        if self.gate_signal.per not in ("head", "value"):
            raise SpecError(f"gate.per={self.gate_signal.per!r}: expected one of ['head', 'value'], the axes of an output")

    def build(self, size):
        return OutputGateModule(size.key)


class OutputGateModule(StageModule):
    def __init__(self, key: str):
        super().__init__()
        self.key = key

    def forward(self, x, call):
        gate = call.late[self.key](call) if self.key in call.late else call.signals[self.key]
        gate = gate.to(x.dtype)
        return x * (gate if gate.ndim == x.ndim else gate[..., None])


@dataclass(frozen=True, kw_only=True)
class PassBy(Stage):
    """A stage that adds the token's own value; a token with several values has none to add."""

    output_only: ClassVar[bool] = True

    def check_size(self, size) -> None:
        self.only_in(size, "output")
        if size.micro_steps > 1:
            raise SpecError(f"layer.output: {self.kind} adds the token's value; with steps={size.micro_steps} it has several")


@stage("skip")
@dataclass(frozen=True, kw_only=True)
class Skip(PassBy):
    """o + D * v, D learned from 1: one per head (Mamba-2, 2405.21060) or one per channel (Longhorn, 2407.14207)."""

    per: Literal["head", "value"] = "head"

    def build(self, size):
        self.check_size(size)
        return SkipModule(size.heads, 1 if self.per == "head" else size.width)


class SkipModule(StageModule):
    def __init__(self, heads: int, width: int):
        super().__init__()
        self.D = nn.Parameter(torch.empty(heads, width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.D)

    def forward(self, x, call):
        return x + self.D * call.streams["v"]


@stage("bonus")
@dataclass(frozen=True, kw_only=True)
class Bonus(PassBy):
    """o + (sum_j q_j u_j k_j) v with the written key k, u learned per head and channel. Source: RWKV-7 (2503.14456)."""

    initial: float = -0.04

    def build(self, size):
        self.check_size(size)
        return BonusModule(self.initial, size.keys)


class BonusModule(StageModule):
    def __init__(self, initial: float, keys: tuple[int, int]):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(keys))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x, call):
        k = call.streams.get("write_key", call.streams["k"])
        strength = (call.streams["q"] * self.weight * k).sum(-1, keepdim=True)
        v = call.streams["v"]
        return x + strength.repeat_interleave(v.shape[2] // strength.shape[2], 2) * v
