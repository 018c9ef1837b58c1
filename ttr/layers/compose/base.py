"""What a composition is: a declaration whose parts are declarations, and the layer that runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...choice import PathChoice
from ...constant import Declaration
from ...registry import COMPOSITIONS, SpecError
from ...schema import default_of, dump
from ...spec import Spec
from ...spec import spec as read_spec
from ..causal import CausalLayer
from ..mixer import Mixer
from ..state import ComposedState, MixerState

PERSISTENT_STD = 0.02


@dataclass(frozen=True)
class Place:
    """Where the layer stands and how its memory runs, as `ttr.layer` was told."""

    d_model: int
    layer_idx: int
    n_layers: int
    path: PathChoice
    layer_overrides: Mapping[str, Any]

    def mixer(self, spec: Spec, *, path: PathChoice = "auto", given: tuple[str, ...] = ()) -> Mixer:
        return Mixer(
            self.d_model, spec, layer_idx=self.layer_idx, n_layers=self.n_layers, path=path, given=given, **self.layer_overrides
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Composition(Declaration):
    """Layers made into one; `parts` names the fields that are declarations (a preset name, YAML path, mapping or Spec).

    persistent: learned vectors that every sequence begins with. A subclass adds its parts, `equations` and `build`.
    Raises SpecError for parts without a meaning together.
    """

    registry: ClassVar = COMPOSITIONS
    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    name: str | None = field(default=None, compare=False)
    persistent: int = 0

    def __post_init__(self):
        if self.persistent < 0:
            raise SpecError(f"compose.persistent={self.persistent}: expected at least 0")
        for part in self.parts:
            try:
                object.__setattr__(self, part, read_spec(getattr(self, part)))
            except SpecError as error:
                raise SpecError(f"compose.{part}: {error}") from error

    def build(self, place: Place) -> ComposedLayer:
        raise NotImplementedError(f"composition {self.kind!r} must define build(place)")

    def equations(self) -> tuple[str, ...]:
        """The composition in lines of mathematics, its parts as functions."""
        raise NotImplementedError(f"composition {self.kind!r} must define equations()")

    def remembered(self) -> dict[str, Spec]:
        """The parts of the layer's state, and the declaration that each is run by."""
        return {part: getattr(self, part) for part in self.parts}

    def tokens_read(self, T: int) -> dict[str, int]:
        """How many tokens every part holds something of when the layer has read T."""
        return {part: self.persistent + T for part in self.parts}

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """Plain data that `ttr.declare` reads back to an equal composition; `full` writes defaults too."""
        body: dict[str, Any] = {"kind": self.kind}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in self.parts:
                body[f.name] = value.to_dict(full)
            elif f.name != "name" and (full or value != default_of(type(self), f.name)):
                body[f.name] = dump(value, full)
        return {"compose": body} if self.name is None else {"name": self.name, "compose": body}

    def to_yaml(self, full: bool = False) -> str:
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict(full)))

    @property
    def hash(self) -> str:
        """Twelve hex digits that two compositions share exactly when they declare the same layer (names do not count)."""
        body = self.to_dict(full=True)["compose"] | {part: getattr(self, part).hash for part in self.parts}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]


def repeated(state: MixerState, n: int) -> MixerState:
    """The state of one sequence for n that begin alike."""
    return state.index_select(torch.zeros(n, dtype=torch.long))


class ComposedLayer(CausalLayer[ComposedState]):
    """A composition as a module; `spec` is its declaration, `o_proj` the linear map that it ends with."""

    state_class = ComposedState
    o_proj: nn.Linear

    def __init__(self, spec: Composition, place: Place):
        super().__init__()
        self.spec, self.spec_hash, self.d_model = spec, spec.hash, place.d_model
        self.persistent = nn.Parameter(torch.empty(spec.persistent, place.d_model)) if spec.persistent else None

    def mixers(self) -> dict[str, Mixer]:
        return {part: getattr(self, part) for part in self.spec.parts}

    def forward(self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        for mixer in self.mixers().values():
            mixer.warn_unread(x)
        return super().forward(x, mask, cu_seqlens)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ComposedState:
        """The state before the first token; persistent vectors are read already, where and as precisely as they are kept.

        dtype: of the layer's activations.
        """
        weight = self.o_proj.weight
        device, dtype = weight.device if device is None else torch.device(device), weight.dtype if dtype is None else dtype
        return self.state(self.fresh(batch_size, device, dtype))

    def fresh(self, n: int, device: torch.device, dtype: torch.dtype) -> dict[str, MixerState]:
        """The states of the parts behind the persistent vectors, which every part reads as it reads tokens."""
        P = self.persistent
        if P is None:
            return {name: m.init_state(n, device=device, dtype=dtype) for name, m in self.mixers().items()}
        parts = {name: m.init_state(1, device=P.device, dtype=P.dtype) for name, m in self.mixers().items()}
        _, state = self.run(P[None], self.state(parts), None)
        return {name: repeated(part, n).to(device) for name, part in state.parts.items()}

    def begin(self, x: Tensor, state: ComposedState | None, cu_seqlens: Tensor | None) -> dict[str, MixerState]:
        """The states of the parts before x is read."""
        n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        return self.fresh(n, x.device, x.dtype) if state is None else state.parts

    def state(self, parts: dict[str, MixerState]) -> ComposedState:
        return ComposedState(parts, self.spec_hash)

    def reset_parameters(self) -> None:
        """Initialise everything as published; also after `to_empty`."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]
        self.reset_persistent()

    def reset_persistent(self) -> None:
        if self.persistent is not None:
            nn.init.normal_(self.persistent, std=PERSISTENT_STD)

    def extra_repr(self) -> str:
        own = f", persistent={self.spec.persistent}" if self.spec.persistent else ""
        return f"{self.spec.name or 'unnamed'}: {self.spec.kind}, d_model={self.d_model}{own}"
