"""State: what a layer's memory is between two tokens. Its size does not depend on how much was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = dict[str, Any]


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `fn` to every tensor of nested mappings."""
    return {k: map_tensors(fn, v) for k, v in tree.items()} if isinstance(tree, Mapping) else fn(tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested mappings by dotted name."""
    out: dict[str, Tensor] = {}
    for name, item in tree.items():
        out |= flatten(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return out


def tensors(tree: Any) -> list[Tensor]:
    return [t for v in tree.values() for t in tensors(v)] if isinstance(tree, Mapping) else [tree]


class TreeMethods:
    """Methods shared by every state: a dataclass whose fields are nested mappings of tensors, batch axis first."""

    def _trees(self) -> dict[str, Tree]:
        raise NotImplementedError

    def _with(self, trees: dict[str, Tree]):
        raise NotImplementedError

    def _map(self, fn: Callable[[Tensor], Tensor]):
        return self._with(map_tensors(fn, self._trees()))

    def detach(self):
        """The same state, cut off from the graph that made it."""
        return self._map(Tensor.detach)

    def clone(self):
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str | None = None):
        """Moved to a device; the dtype of a state is part of its meaning and stays."""
        return self._map(lambda t: t.to(device=device))

    def index_select(self, index: Tensor):
        """The states of some sequences, in the order of `index`: [M] (beam search, batch splitting)."""
        return self._map(lambda t: t.index_select(0, index.to(t.device)))

    @property
    def nbytes(self) -> int:
        """Bytes held, all sequences together."""
        return sum(t.numel() * t.element_size() for t in tensors(self._trees()))


@dataclass
class State(TreeMethods):
    """The memory of one `ttr.regress` call.

    weights: the regressor's inner weights, each [B, Hv, ...] (linear: {"W": [B, Hv, dk, dv]}).
    slots: the optimizer's further slots, {slot: {weight name: [B, Hv, ...]}}.
    mini_batch: the open mini-batch (its start weights, what it has gathered, and `position`: [B]), and the pairs that a
    window still looks back to.
    spec_hash: of the declaration it belongs to.
    """

    weights: Tree
    slots: Tree = field(default_factory=dict)
    mini_batch: Tree = field(default_factory=dict)
    spec_hash: str = ""

    def _trees(self):
        return {"weights": self.weights, "slots": self.slots, "mini_batch": self.mini_batch}

    def _with(self, trees):
        return State(**trees, spec_hash=self.spec_hash)

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors without a graph, and the spec's hash: `torch.load(..., weights_only=True)` reads it back."""
        return {**self.detach()._trees(), "spec_hash": self.spec_hash}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], spec: Any) -> State:
        """The inverse of `to_dict`; raises ValueError when it was made under another declaration than `spec`."""
        from .spec import spec as read_spec

        fields = ("weights", "slots", "mini_batch", "spec_hash")
        missing = [name for name in fields if name not in data]
        if missing:
            raise ValueError(f"state is missing {missing}; expected the keys {list(fields)}")
        expected = read_spec(spec).hash
        if data["spec_hash"] != expected:
            raise ValueError(f"state.spec_hash={data['spec_hash']!r} was made under another declaration; this one has {expected!r}")
        return cls(**{name: data[name] for name in fields})


def _flatten(state: State):
    return [state.weights, state.slots, state.mini_batch], state.spec_hash


def _unflatten(children, spec_hash):
    return State(*children, spec_hash=spec_hash)


pytree.register_pytree_node(State, _flatten, _unflatten, serialized_type_name="ttr.State")
