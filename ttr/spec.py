"""Spec: the declaration of a layer, and how one is read from a preset name, a YAML file or a mapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import gates, inner_optim, objectives, regressors, stages  # noqa: F401  (they fill the registries)
from .constant import Declaration, constant, remember
from .gates import Gate, NoGate
from .inner_optim import SGD, Delta, Optimizer, Plain, Solver
from .objectives import L2, Dot
from .registry import OBJECTIVES, OPTIMIZERS, SLOTS, STAGES, SpecError
from .regressors import Linear, Regressor
from .schema import dump, parse, parse_kind
from .signals import Signal
from .sources import presets, read
from .stages import Stage

RESERVED = {"q", "k", "v", "spec", "params", "write_key", "scale", "initial_state", "cu_seqlens", "path"}  # arguments of regress
STREAMS = ("q", "k", "write_key", "v", "output")


@dataclass(frozen=True, kw_only=True)
class Read:
    """When and how the query reads: after or before the token's own update; with a normaliser or without.

    normalizer: `sum` divides by n + eps, `max1` by max(|n|, 1), n the prediction of one more value channel of ones.
    scale: multiplies q; null is dk^-1/2 for a linear regressor with a first-order optimizer and for kernel, else 1.
    """

    shorthand: ClassVar[str] = "at"
    at: Literal["after", "before"] = "after"
    normalizer: Literal["none", "sum", "max1"] = "none"
    scale: float | None = None
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes and streams around the mathematics; `ttr.regress` never applies them.

    expand_k, expand_v: total key and value width over d_model. head_dim: of keys, or as near as the widths divide.
    n_heads: memories (null: as many as that makes; given: head_dim follows from it). n_key_heads divides it.
    q, k, v, write_key, output: ordered stages.
    """

    expand_k: float = 1.0
    expand_v: float = 1.0
    head_dim: int = 64
    n_heads: int | None = None
    n_key_heads: int | None = None
    q: tuple[Stage, ...] | None = None
    k: tuple[Stage, ...] | None = None
    write_key: tuple[Stage, ...] | None = None
    v: tuple[Stage, ...] | None = None
    output: tuple[Stage, ...] | None = None

    def __post_init__(self):
        for name in ("expand_k", "expand_v", "head_dim", "n_heads", "n_key_heads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SpecError(f"layer.{name}={value}: expected > 0")
        if self.n_heads is not None and self.n_key_heads is not None and self.n_heads % self.n_key_heads:
            raise SpecError(f"layer.n_key_heads={self.n_key_heads} does not divide layer.n_heads={self.n_heads}")
        for stream in STREAMS[:-1]:
            for s in getattr(self, stream) or ():
                if s.output_only:
                    raise SpecError(f"layer.{stream}: stage {s.kind!r} belongs to `output` only")


def default_streams(regressor: Regressor) -> dict[str, tuple[str, ...]]:
    if regressor.kind == "kernel":
        return {"q": ("rope",), "k": ("rope",), "v": (), "output": ()}
    return {"q": ("conv", "silu", "l2"), "k": ("conv", "silu", "l2"), "v": ("conv", "silu"), "output": ("rms", "gate")}


@dataclass(frozen=True, kw_only=True)
class Spec(Declaration):
    """A test-time regression layer: regressor x objective x optimizer x gate x read, and the layer around them.

    Equivalent declarations make equal Specs (the name does not count). Raises SpecError for combinations without a
    meaning, with the reason.
    """

    name: str | None = field(default=None, compare=False)
    regressor: Regressor = field(default_factory=Linear)
    objective: Any = None  # Objective; None only for the kernel regressor
    optimizer: Any = None  # Optimizer | Solver; None only for the kernel regressor
    gate: Gate = field(default_factory=NoGate)
    read: Read = field(default_factory=Read)
    layer: Layer = field(default_factory=Layer)

    def __post_init__(self):
        for slot, registry in SLOTS.items():
            if getattr(self, slot) is not None:
                object.__setattr__(self, slot, parse_kind(registry, getattr(self, slot), slot))
        self._set_objective()
        if type(self.optimizer) is SGD and isinstance(self.objective, L2) and self.regressor.family == "trained":
            values = {f.name: getattr(self.optimizer, f.name) for f in fields(SGD)}
            object.__setattr__(self, "optimizer", Delta(**values))
        self._normalise()
        streams = {
            stream: tuple(STAGES.get(kind)() for kind in kinds)
            for stream, kinds in default_streams(self.regressor).items()
            if getattr(self.layer, stream) is None
        }
        if streams:
            object.__setattr__(self, "layer", replace(self.layer, **streams))
        self._remember("regressor", "objective", "optimizer", "gate")
        self._check()
        remember(self)

    def _remember(self, *slots: str) -> None:
        for slot in slots:
            piece = getattr(self, slot)
            try:
                if piece is not None:
                    remember(piece)
            except TypeError as error:
                raise SpecError(f"{slot}={piece!r}: every field of a piece must be hashable (tuples, no lists): {error}") from error

    def __hash__(self) -> int:
        """Worked out once: every call of `ttr.regress` looks its declaration up."""
        if "_hash" not in self.__dict__:
            object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self) if f.compare)))
        return self.__dict__["_hash"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_hash"}  # strings hash anew in every process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember("regressor", "objective", "optimizer", "gate")
        remember(self)

    def _normalise(self) -> None:
        """Write what changes nothing one way, so that equivalent declarations are equal."""
        if isinstance(self.optimizer, Optimizer) and self.objective is not None:
            # gradients that do not see the gate have no order; frozen ones are taken at the undecayed weights
            blind = self.objective.kind == "dot" and self.regressor.linear
            order = "first" if blind else "coupled" if self.mini_batch != 1 and self.gate.decays else self.gate.order
            if order != self.gate.order:
                object.__setattr__(self, "gate", replace(self.gate, order=order))
            if self.objective.kind == "dot" and self.optimizer.step_rule.kind == "implicit":
                object.__setattr__(self, "optimizer", replace(self.optimizer, step_rule=Plain()))
        if self.read.normalizer != "sum" and self.read.eps != Read().eps:
            object.__setattr__(self, "read", replace(self.read, eps=Read().eps))

    def _set_objective(self) -> None:
        if self.regressor.kind == "kernel" or self.objective is not None:
            return
        if self.optimizer is None:
            raise SpecError(f"optimizer is missing; choose from {OPTIMIZERS.kinds()}")
        if type(self.optimizer) is SGD and not self.regressor.linear and self.regressor.family == "trained":
            raise SpecError(
                f"optimizer=sgd on regressor={self.regressor.kind!r} must say what it descends: "
                f"set objective to one of {OBJECTIVES.kinds()} (on a linear regressor it is dot)"
            )
        object.__setattr__(self, "objective", Dot() if type(self.optimizer) is SGD and self.regressor.linear else L2())

    def _check(self) -> None:
        if self.regressor.kind != "kernel" and self.optimizer is None:
            raise SpecError(f"optimizer is missing; choose from {OPTIMIZERS.kinds()}")
        for piece in (self.regressor, self.objective, self.optimizer, self.gate):
            if piece is not None:
                piece.check(self)
        if self.read.normalizer != "none" and not self.regressor.linear:
            raise SpecError(
                f"read.normalizer={self.read.normalizer!r} is one more value channel: "
                f"it needs regressor linear, got {self.regressor.kind!r}"
            )
        if self.read.normalizer != "none":
            per_value = [name for name, s in self.signals().items() if s.per == "value"]
            if per_value:
                raise SpecError(
                    f"read.normalizer={self.read.normalizer!r} adds a value channel for which {per_value} per value says nothing"
                )
            if getattr(self.objective, "reduce", "sum") == "mean":
                raise SpecError(
                    f"read.normalizer={self.read.normalizer!r} adds a value channel, which objective.reduce='mean' would count; use sum"
                )
        separate = isinstance(self.optimizer, Optimizer) and self.optimizer.write_key == "separate"
        if self.layer.write_key is not None and not separate:
            raise SpecError("layer.write_key is a stream of optimizer.write_key='separate', which is not declared")
        names = [name for piece in self._pieces() for name in piece.signals()]
        for name in names:
            owners = [f"{p.registry.slot} {p.kind!r}" for p in self._pieces() if name in p.signals()]
            if len(owners) > 1:
                raise SpecError(f"{' and '.join(owners)} both declare the signal {name!r}; rename it in one of them")
            if name in RESERVED:
                raise SpecError(f"{owners[0]} declares the signal {name!r}, but ttr.regress has an argument of that name; rename it")
        self._check_ties()

    def _check_ties(self) -> None:
        gate = self.gate.signals().get("log_decay")
        for piece in (*self._pieces(), *(self.layer.output or ())):
            for name, s in piece.signals().items():
                if s.tie is None:
                    continue
                if piece is self.gate:
                    raise SpecError(f"gate.tie={s.tie!r}: a gate cannot be tied to itself")
                if gate is None or gate.constant or not hasattr(gate.map, "dt_of"):
                    raise SpecError(f"{name}.tie={s.tie!r} is the time step of a gate with map mamba; there is none")
                if gate.per != s.per:
                    raise SpecError(f"{name}.tie={s.tie!r}: the gate is per {gate.per}, {name} per {s.per}; they must agree")

    def _pieces(self) -> list[Any]:
        return [p for p in (self.regressor, self.objective, self.optimizer, self.gate) if p is not None]

    def signals(self) -> dict[str, Signal]:
        """Every per-token quantity of the declaration, by the name `ttr.regress` takes it under."""
        return {name: s for piece in self._pieces() for name, s in piece.signals().items()}

    @property
    def steps(self) -> int:
        return self.optimizer.steps if isinstance(self.optimizer, Optimizer) else 1

    @property
    def mini_batch(self) -> int | str:
        return self.optimizer.mini_batch if isinstance(self.optimizer, Optimizer) else 1

    @property
    def window(self) -> int:
        """Pairs whose losses a token's gradient sums."""
        return getattr(self.objective, "window", 1)

    @property
    def separate_write_key(self) -> bool:
        return isinstance(self.optimizer, Optimizer) and self.optimizer.write_key == "separate"

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The weight tensors that an optimizer trains, in the order in which a signal per tensor has them."""
        return tuple(self.regressor.state_shapes(16, 16)) if self.regressor.family == "trained" else ()

    def scale(self, dk: int) -> float:
        """What q is multiplied by when the caller does not say."""
        if self.read.scale is not None:
            return self.read.scale
        small = self.regressor.kind == "kernel" or (self.regressor.linear and not isinstance(self.optimizer, Solver))
        return dk**-0.5 if small else 1.0

    def init_params(
        self, n_heads: int, dk: int, dv: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None, generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Learned constants that are not per token (W_0, norm affine, ridge, ...), each [n_heads, ...]."""
        self.regressor.check_sizes(dk, dv)
        params = {
            name: init(n_heads, generator) for name, init in self.regressor.init(dk, dv).items() if self._is_param(name, init)
        }  # fmt: skip
        params |= self.gate.init_params(n_heads, dk)
        if isinstance(self.optimizer, Optimizer) and self.optimizer.position == "learned":
            params["position"] = torch.zeros(n_heads, int(self.mini_batch))
        return {name: p.to(device=device, dtype=dtype) for name, p in params.items()}

    def param_shapes(self, n_heads: int, dk: int, dv: int) -> dict[str, tuple[int, ...]]:
        """The names and shapes of what `init_params` makes."""
        shapes = {name: (n_heads, *init.shape) for name, init in self.regressor.init(dk, dv).items() if self._is_param(name, init)}
        shapes |= {name: tuple(p.shape) for name, p in self.gate.init_params(n_heads, dk).items()}
        if isinstance(self.optimizer, Optimizer) and self.optimizer.position == "learned":
            shapes["position"] = (n_heads, int(self.mini_batch))
        return shapes

    def _is_param(self, name: str, init: Any) -> bool:
        return init.learned or name in self.regressor.outer

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """Plain data that `ttr.spec` reads back to an equal Spec; `full` writes defaults too."""
        out = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and (full or f.name != "gate" or value != NoGate()):
                data = dump(value, full)
                if data != {}:
                    out[f.name] = data
        return out

    def to_yaml(self, full: bool = False) -> str:
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict(full)))

    def __str__(self) -> str:
        """What was declared, as YAML; what was left to its default is left out."""
        return self.to_yaml().rstrip()

    @property
    def hash(self) -> str:
        """Twelve hex digits that two Specs share exactly when they declare the same layer (the name does not count)."""
        return _hash_of(self)


@constant
def _hash_of(spec: Spec) -> str:
    body = {k: _floats(v) for k, v in spec.to_dict(full=True).items() if k != "name"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]


def _floats(data: Any) -> Any:
    """Plain data in which 4 and 4.0 are one number, as they are to ==."""
    if isinstance(data, dict):
        return {k: _floats(v) for k, v in data.items()}
    if isinstance(data, list):
        return [_floats(v) for v in data]
    return float(data) if isinstance(data, int) and not isinstance(data, bool) else data


def spec(source: str | Path | Mapping | Spec, **overrides: Any) -> Spec:
    """A Spec from a preset name, a YAML path, a mapping or a Spec, with overrides.

    Overrides are top-level slots or dotted keys: `spec("kda", optimizer="momentum", **{"layer.n_heads": 4})`. As
    under `base:`, a mapping without `kind` merges into the slot and anything else replaces it.
    """
    if isinstance(source, Spec) and not overrides:
        return source
    if isinstance(source, str) and not overrides and _load(source):
        return _presets[source]
    return _resolve(read(source, overrides))


_presets: dict[str, Spec] = {}


@constant
def _load(name: str) -> bool:
    """Whether `name` is a preset; if so it is in _presets from now on, where torch.compile may look for it, too."""
    if name in presets():
        _presets[name] = _resolve(read(name))
    return name in _presets


def _resolve(body: Mapping[str, Any]) -> Spec:
    values: dict[str, Any] = {}
    if "compose" in body:
        raise SpecError(
            f"{body.get('name') or 'this declaration'} composes layers (compose={body['compose']!r}), which ttr.layer(d_model, ...) makes; "
            "here one memory is expected"
        )
    for key, value in body.items():
        if value is None:
            continue
        if key in SLOTS:
            values[key] = parse_kind(SLOTS[key], value, key)
        elif key == "name":
            values[key] = str(value)
        else:
            values[key] = parse(Read if key == "read" else Layer, value, key)
    return Spec(**values)
