"""The projection of a layer's input to all signals of its declaration, with their published initialisations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..registry import SpecError
from ..signals import Mamba, Signal
from ..stages import Call
from ..stages.conv import ShiftModule

ACTIVATIONS = {"none": lambda z: z, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


class LowRank(nn.Module):
    """x -> up(activation(down(x))), without biases."""

    def __init__(self, d_in: int, rank: int, d_out: int, activation: str = "none"):
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.up(ACTIVATIONS[self.activation](self.down(x)))

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        self.up.reset_parameters()


@dataclass(frozen=True)
class SignalSize:
    """How many numbers a signal has per token: [heads, width], or [steps, heads, width] (None: no micro-step axis).

    wide: in float32 at least, as log decays and steps need it.
    """

    heads: int
    width: int
    steps: int | None = None
    shift_power: float = 0.9  # RWKV-7's for decay and erase rate
    wide: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.heads, self.width) if self.steps is None else (self.steps, self.heads, self.width)

    @property
    def total(self) -> int:
        return self.heads * self.width * (self.steps or 1)


class SignalProjection(nn.Module):
    """Values of all signals from one layer input, scale * map(cap(W source + bias)).

    Full-rank signals of one source share one matrix (and, from `shift`, one mix); a low-rank one has two of its own. late: the names
    of those that come as `Call.late`, if they are projected and not tied to another.
    Biases and the maps' constants are bare parameters: host models zero every nn.Linear.bias.
    """

    def __init__(
        self,
        signals: dict[str, Signal],
        sizes: dict[str, SignalSize],
        sources: dict[str, int],
        *,
        head_dim: int,
        layer_idx: int = 0,
        n_layers: int = 1,
        late: Collection[str] = (),
    ):
        super().__init__()
        self.signals = {name: s for name, s in signals.items() if not s.constant}
        self.late = [name for name in late if signals[name].tie is None]
        self.sizes = sizes
        free = {name: s for name, s in self.signals.items() if s.tie is None}
        self.fused_names: dict[str, list[str]] = {}
        for name, s in free.items():
            if s.rank is None:
                self.fused_names.setdefault(s.source, []).append(name)
        self.fused = nn.ModuleDict(
            {
                source: nn.Linear(sources[source], sum(sizes[n].total for n in names), bias=False)
                for source, names in self.fused_names.items()
            }
        )
        self.low_rank, self.shift = nn.ModuleDict(), nn.ModuleDict()
        self.bias, self.maps = nn.ParameterDict(), nn.ModuleDict()
        for name, s in free.items():
            if s.rank is not None:
                rank = head_dim if s.rank == "head_dim" else s.rank
                self.low_rank[name] = LowRank(sources[s.source], rank, sizes[name].total, s.rank_activation)
            key = name if s.rank is not None else "fused"
            if s.source == "shift" and key not in self.shift:
                self.shift[key] = ShiftModule(sizes[name].shift_power, sources["shift"], layer_idx, n_layers)
            if s.bias is not None:
                self.bias[name] = nn.Parameter(torch.empty(sizes[name].shape))
            constants = s.map.init_params(sizes[name].heads, sizes[name].width)
            if constants:
                self.maps[name] = nn.ParameterDict({k: nn.Parameter(torch.empty_like(p)) for k, p in constants.items()})
        for name, s in self.signals.items():
            if s.tie is not None:
                self._check_tie(name, s)
        self.reset_parameters()

    def _check_tie(self, name: str, s: Signal) -> None:
        gate = self.signals.get("log_decay")
        if gate is None or not isinstance(gate.map, Mamba):
            raise SpecError(f"{name}.tie='gate.dt' is the time step of a gate with map mamba; there is none")
        if gate.per != s.per:
            raise SpecError(f"{name}.tie='gate.dt': the gate is per {gate.per}, {name} per {s.per}; they must agree")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in (*self.fused.values(), *self.low_rank.values(), *self.shift.values()):
            module.reset_parameters()  # type: ignore[operator]
        for name, bias in self.bias.items():
            value = self.signals[name].bias or 0.0
            low, high = value if isinstance(value, tuple) else (value, value)
            size = self.sizes[name]
            spread = torch.linspace(low, high, size.heads * size.width)
            bias.copy_(spread.view(size.heads, size.width).expand(size.shape))
        for name, constants in self.maps.items():
            size = self.sizes[name]
            for key, value in self.signals[name].map.init_params(size.heads, size.width).items():
                constants[key].copy_(value)  # type: ignore[index]

    def forward(self, call: Call) -> dict[str, Tensor]:
        """Values by name: [B, T, (steps,) heads] for signals per head, else [B, T, (steps,) heads, width]."""
        z: dict[str, Tensor] = {}
        for source, names in self.fused_names.items():
            fused = self.fused[source](self._source(source, "fused", call))
            parts = fused.split([self.sizes[n].total for n in names], -1)
            z |= dict(zip(names, parts, strict=True))
        for name in self.late:
            call.late[name] = partial(self._late_value, name, z.get(name))
        now = [name for name in self.signals if name not in self.late]
        own = {name: self._pre_activation(name, z.get(name), call) for name in now if self.signals[name].tie is None}
        return {name: self._value(name, own[name if name in own else "log_decay"]) for name in now}

    def _late_value(self, name: str, part: Tensor | None, call: Call) -> Tensor:
        return self._value(name, self._pre_activation(name, part, call))

    def _value(self, name: str, z: Tensor) -> Tensor:
        """z: the signal's pre-activation, or of one that is tied the gate's."""
        s = self.signals[name]
        if s.tie is None:
            value = s.map(z, self._constants(name))
        else:
            gate = self.signals["log_decay"].map
            assert isinstance(gate, Mamba)  # _check_tie
            value = gate.dt_of(z, self._constants("log_decay"))  # type: ignore[attr-defined]
        value = value if s.scale == 1.0 else s.scale * value
        return value.squeeze(-1) if s.per == "head" else value

    def _constants(self, name: str) -> dict[str, Tensor]:
        return dict(self.maps[name].items()) if name in self.maps else {}  # type: ignore[operator]

    def _source(self, source: str, key: str, call: Call) -> Tensor:
        if source == "x":
            return call.x
        if source == "shift":
            return self.shift[key](call.x, call)
        if source == "v":
            return call.streams["v"].flatten(2)
        return torch.cat([call.streams[name].flatten(2) for name in ("q", "k", "v")], -1)

    def _pre_activation(self, name: str, part: Tensor | None, call: Call) -> Tensor:
        """part: the signal's, of what all make together, or None for one of low rank."""
        made: Tensor = self.low_rank[name](self._source(self.signals[name].source, name, call)) if part is None else part
        z = made.unflatten(-1, self.sizes[name].shape)
        if self.sizes[name].wide and z.dtype in (torch.float16, torch.bfloat16):
            z = z.float()
        if name in self.bias:
            bias = self.bias[name]
            z = z + (bias if self.sizes[name].wide else bias.to(z.dtype))
        cap = self.signals[name].softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {list(self.sizes[name].shape)}" for name in self.signals)
