"""Signals: every per-token quantity of a declaration (step, log_decay, momentum, weight, ...) in one small language.

A signal is a number, a map name, or a mapping; its value is `scale * map(projection of the layer's input)`.
`ttr.regress` takes the *values*; only `ttr.Mixer` projects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import SIGNAL_MAPS, SpecError, signal_map


@dataclass(frozen=True, kw_only=True)
class SignalMap:
    """An elementwise map from a pre-activation z: [..., Hv, width] to a signal's value before `scale`."""

    kind: ClassVar[str]
    registry: ClassVar = SIGNAL_MAPS

    def init_params(self, n_heads: int, width: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Learned constants of the map, each with leading [n_heads]."""
        return {}

    def __call__(self, z: Tensor, params: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError(f"signal map {self.kind!r} must define __call__(z, params)")


@signal_map("identity")
@dataclass(frozen=True, kw_only=True)
class Identity(SignalMap):
    def __call__(self, z, params):
        return z


@signal_map("sigmoid")
@dataclass(frozen=True, kw_only=True)
class Sigmoid(SignalMap):
    def __call__(self, z, params):
        return torch.sigmoid(z)


@signal_map("logsigmoid")
@dataclass(frozen=True, kw_only=True)
class LogSigmoid(SignalMap):
    def __call__(self, z, params):
        return F.logsigmoid(z)


@signal_map("softplus")
@dataclass(frozen=True, kw_only=True)
class Softplus(SignalMap):
    def __call__(self, z, params):
        return F.softplus(z)


@signal_map("exp")
@dataclass(frozen=True, kw_only=True)
class Exp(SignalMap):
    def __call__(self, z, params):
        return torch.exp(z)


@signal_map("silu")
@dataclass(frozen=True, kw_only=True)
class SiLU(SignalMap):
    def __call__(self, z, params):
        return F.silu(z)


@signal_map("mamba")
@dataclass(frozen=True, kw_only=True)
class Mamba(SignalMap):
    """Mamba-2's log decay, -A_h softplus(z + dt_bias), natural log.

    A_h ~ U(A[0], A[1]) per head, kept as A_log; dt_bias is set so that softplus(dt_bias) is log-uniform in `dt`
    (with dt_bias = 0 instead, KDA stays at chance on hard recall). Source: Mamba-2 (2405.21060), reference code.
    """

    A: tuple[float, float] = (1.0, 16.0)
    dt: tuple[float, float] = (1e-3, 1e-1)

    def __post_init__(self):
        if not 0 <= self.A[0] <= self.A[1]:
            raise SpecError(f"mamba.A={list(self.A)}: expected [low, high] with 0 <= low <= high")
        if not 0 < self.dt[0] <= self.dt[1]:
            raise SpecError(f"mamba.dt={list(self.dt)}: expected [low, high] with 0 < low <= high")

    def init_params(self, n_heads, width, generator=None):
        A = torch.empty(n_heads).uniform_(*self.A, generator=generator).clamp_min(1e-4)
        lo, hi = (math.log(x) for x in self.dt)
        dt = torch.empty(n_heads, width).uniform_(lo, hi, generator=generator).exp().clamp_min(1e-4)
        return {"A_log": A.log(), "dt_bias": dt + torch.log(-torch.expm1(-dt))}  # inverse softplus of dt

    def dt_of(self, z: Tensor, params: dict[str, Tensor]) -> Tensor:
        """The time step softplus(z + dt_bias), which Mamba-2 ties to the write strength."""
        return F.softplus(z + params["dt_bias"])

    def __call__(self, z, params):
        return -params["A_log"].exp()[:, None] * self.dt_of(z, params)


Per = Literal["head", "key", "value", "tensor", "window"]


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One per-token quantity.

    value: a constant (then nothing else is declared). Otherwise
    value_t = scale * map(cap(W source_t + bias)), cap(z) = softcap * tanh(z / softcap).
    per: one number per head, per key channel, per value channel, per weight tensor of the regressor, or per pair of the
    objective's window.
    rank: width of a bottleneck in the projection (`head_dim` for the layer's head size).
    bias: initial bias before the map; [lo, hi] = linspace over the heads and their channels; None = no bias.
    source: what is projected (the input, the shifted input, the concatenated q, k, v, or v).
    tie: reuse another signal's inner quantity instead of projecting (`gate.dt`: Mamba-2).
    """

    value: float | None = None
    map: SignalMap = field(default_factory=Sigmoid)
    scale: float = 1.0
    softcap: float | None = None
    per: Per = "head"
    rank: int | Literal["head_dim"] | None = None
    rank_activation: Literal["none", "tanh", "sigmoid"] = "none"
    bias: float | tuple[float, float] | None = None
    source: Literal["x", "shift", "qkv", "v"] = "x"
    tie: Literal["gate.dt"] | None = None

    def __post_init__(self):
        if isinstance(self.rank, int) and self.rank < 1:
            raise SpecError(f"rank={self.rank}: expected at least 1, `head_dim` or null")
        if self.softcap is not None and not self.softcap > 0:
            raise SpecError(f"softcap={self.softcap}: expected > 0 or null")
        if self.rank is None and self.rank_activation != "none":
            raise SpecError(f"rank_activation={self.rank_activation!r} acts inside a bottleneck: it needs rank")
        if self.tie is not None:
            own = {"rank": self.rank, "bias": self.bias, "softcap": self.softcap, "source": None if self.source == "x" else self.source}
            given = [name for name, value in own.items() if value is not None]
            if given:
                raise SpecError(f"tie={self.tie!r} takes another signal's quantity and projects nothing of its own, got {given}")

    @property
    def constant(self) -> bool:
        return self.value is not None

    def width(self, dk: int, dv: int, tensors: int, window: int = 1) -> int:
        """Numbers per head and token; tensors: how many weight tensors the regressor has; window: the objective's."""
        return {"head": 1, "key": dk, "value": dv, "tensor": tensors, "window": window}[self.per]


def signal(default: float | str, **fields: Any) -> Any:
    """A dataclass field holding a Signal: `step: Signal = ttr.signal("sigmoid", bias=-2.0)`."""
    return field(default_factory=lambda: make_signal(default, **fields))


def make_signal(default: float | str, **fields: Any) -> Signal:
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return Signal(value=float(default), **fields)
    if not isinstance(default, str):
        raise SpecError(f"a signal's default is a number or a map name, got {default!r}")
    return replace(Signal(**fields), map=SIGNAL_MAPS.get(default)())
