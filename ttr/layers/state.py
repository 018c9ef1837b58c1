"""What a layer and a language model remember between two tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils import _pytree as pytree

from ..spec import Spec
from ..state import State, Tree, TreeMethods


@dataclass
class MixerState(TreeMethods):
    """memory: the regressor's. conv: last inputs of every convolution. shift: the last input. position: tokens read.

    All tensors lead with the batch axis; conv, shift and position are empty where the layer has no use for them.
    """

    memory: State
    conv: Tree = field(default_factory=dict)
    shift: Tree = field(default_factory=dict)
    position: Tree = field(default_factory=dict)

    def _trees(self):
        return {"memory": self.memory._trees(), "conv": self.conv, "shift": self.shift, "position": self.position}

    def _with(self, trees):
        return MixerState(self.memory._with(trees["memory"]), trees["conv"], trees["shift"], trees["position"])

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors without a graph, and the spec's hash: `torch.load(..., weights_only=True)` reads it back."""
        plain = self.detach()
        return {"memory": plain.memory.to_dict(), "conv": plain.conv, "shift": plain.shift, "position": plain.position}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], spec: Any) -> MixerState:
        """The inverse of `to_dict`; spec: the declaration, or the Mixer. Raises ValueError for another's."""
        names = ("memory", "conv", "shift", "position")
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"mixer state is missing {missing}; expected the keys {list(names)}")
        own = getattr(spec, "spec", None)
        memory = State.from_dict(data["memory"], own if isinstance(own, Spec) else spec)
        return cls(memory, *(dict(data[name]) for name in names[1:]))


@dataclass
class ComposedState(TreeMethods):
    """What a composition remembers: a MixerState for each of its parts, by name. spec_hash: of the composition."""

    parts: dict[str, MixerState]
    spec_hash: str = ""

    def _trees(self):
        return {name: part._trees() for name, part in self.parts.items()}

    def _with(self, trees):
        return ComposedState({name: part._with(trees[name]) for name, part in self.parts.items()}, self.spec_hash)

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors and the hashes of the declarations: `torch.load(..., weights_only=True)` reads it back."""
        return {"parts": {name: part.to_dict() for name, part in self.parts.items()}, "spec_hash": self.spec_hash}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], spec: Any) -> ComposedState:
        """The inverse of `to_dict`; spec: the composition's declaration, or its layer. Raises ValueError for another's."""
        missing = [name for name in ("parts", "spec_hash") if name not in data]
        if missing:
            raise ValueError(f"composed state is missing {missing}; expected the keys ['parts', 'spec_hash']")
        composition = getattr(spec, "spec", spec)
        if data["spec_hash"] != composition.hash:
            raise ValueError(f"state.spec_hash={data['spec_hash']!r} was made under another declaration; this one has {composition.hash!r}")
        remembered = composition.remembered()
        if data["parts"].keys() != remembered.keys():
            raise ValueError(f"state.parts: got {sorted(data['parts'])}, expected {sorted(remembered)}")
        return cls({name: MixerState.from_dict(data["parts"][name], part) for name, part in remembered.items()}, data["spec_hash"])


LayerState = MixerState | ComposedState


@dataclass
class LMState(TreeMethods):
    """One MixerState, or ComposedState, per block."""

    layers: tuple[LayerState, ...]

    def _trees(self):
        return {str(i): layer._trees() for i, layer in enumerate(self.layers)}

    def _with(self, trees):
        return LMState(tuple(layer._with(trees[str(i)]) for i, layer in enumerate(self.layers)))

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], specs: Any) -> LMState:
        """specs: one declaration per block, or the LM."""
        specs = getattr(specs, "specs", specs)
        if "layers" not in data or len(data["layers"]) != len(specs):
            got = len(data["layers"]) if "layers" in data else "no"
            raise ValueError(f"model state: got {got} layers, expected {len(specs)}")
        kinds = [ComposedState if "parts" in layer else MixerState for layer in data["layers"]]
        return cls(tuple(kind.from_dict(d, s) for kind, d, s in zip(kinds, data["layers"], specs, strict=True)))


pytree.register_pytree_node(
    MixerState,
    lambda s: ([s.memory, s.conv, s.shift, s.position], None),
    lambda children, _: MixerState(*children),
    serialized_type_name="ttr.MixerState",
)
pytree.register_pytree_node(
    ComposedState,
    lambda s: (list(s.parts.values()), (tuple(s.parts), s.spec_hash)),
    lambda children, context: ComposedState(dict(zip(context[0], children, strict=True)), context[1]),
    serialized_type_name="ttr.ComposedState",
)
pytree.register_pytree_node(LMState, lambda s: (list(s.layers), None), lambda c, _: LMState(tuple(c)), serialized_type_name="ttr.LMState")
