"""Titans' MAC: in every segment attention sees what the memory recalls, and the memory learns what attention makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.recall import why_no_recall
from ...registry import SpecError, composition
from ...state import State
from ..state import ComposedState, MixerState
from .base import ComposedLayer, Composition, Place, repeated
from .gate import ProductGate

Parts = dict[str, MixerState]


@composition("mac")
@dataclass(frozen=True, kw_only=True)
class MAC(Composition):
    """Memory as a context, segment i of `segment` tokens x_1 ... x_C at a time, causal token by token:

        h_t = M*_{i-1}(q(x_t))                                      read as the segment begins, without learning
        y_t = attention over [P | h_1 x_1 ... h_t x_t], at x_t
        m_t = M_t(q(y_t)), M_t what M_{t-1} learned of y_t          the memory's own layer, run over y
        o_t = W_o (y_t (x) m_t)                                     the product of `ProductGate`

    The paper's figures let every token of a segment see all of h and read M_i, trained on the whole segment: both would
    show a token its future. Here h_s is seen from x_s on, and m_t is read as the memory reads by itself, after token t: the
    segment's last token sees all of h and reads M_i. h_s stands before x_s, which is where attention's positions put it.
    Source: Titans (2501.00663), section 4.1.
    """

    parts = ("memory", "attention")

    memory: Any
    attention: Any = "softmax"
    segment: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.segment < 1:
            raise SpecError(f"compose.segment={self.segment}: expected at least 1")
        if (why := why_no_recall(self.memory)) is not None:
            raise SpecError(f"compose.memory: mac reads the memory of an earlier segment without learning, but {why}")
        regressor = self.attention.regressor
        if regressor.kind != "kernel" or regressor.window is not None:
            raise SpecError(
                f"compose.attention: a segment is attended to as a whole; expected regressor kernel without a window, "
                f"got {regressor.kind!r} with window={getattr(regressor, 'window', None)}"
            )

    def remembered(self):
        return {"memory": self.memory, "attention": self.attention, "reader": self.memory}

    def tokens_read(self, T):
        return {"memory": T, "attention": self.persistent + 2 * min(T, self.segment)}  # as it ends the segment

    def build(self, place: Place) -> MACLayer:
        return MACLayer(self, place)

    def equations(self):
        prefix = "P | " if self.persistent else ""
        return (
            f"segments of {self.segment} tokens, i the segment of token t:",
            "hₜ = M*ᵢ₋₁(q(xₜ))   (the memory as the segment began, read without learning)",
            f"yₜ = attention over [{prefix}h₁ x₁ … hₜ xₜ] of the segment, at xₜ",
            "mₜ = memory(y)ₜ   (learns from y and is read token by token)",
            "oₜ = Wₒ (n(yₜ) ⊙ silu(n'(mₜ))), n and n' RMS norms",
        )


class MACLayer(ComposedLayer):
    """state.parts: memory, over y; attention, of the open segment; reader, M_{i-1} and its queries' streams, over x.

    Segments run one after another, and so do packed or padded sequences that stand at unlike places in them.
    """

    spec: MAC

    def __init__(self, spec: MAC, place: Place):
        super().__init__(spec, place)
        self.memory = place.mixer(spec.memory, path=place.path)
        self.attention = place.mixer(spec.attention)
        self.gate = ProductGate(place.d_model)
        self.o_proj = nn.Linear(place.d_model, place.d_model, bias=False)
        self.reset_persistent()

    def fresh(self, n: int, device: torch.device, dtype: torch.dtype) -> Parts:
        memory = self.memory.init_state(n, device=device, dtype=dtype)
        attention = self._open_segment(n, device, dtype)
        return {"memory": memory, "attention": attention, "reader": replace(memory, memory=_frozen(memory.memory))}

    def _open_segment(self, n: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """Attention before a segment's first token: it has read the persistent vectors."""
        if self.persistent is None:
            return self.attention.init_state(n, device=device, dtype=dtype)
        return repeated(self.attention.run(self.persistent[None], None, None)[1], n).to(device)

    def run(self, x: Tensor, state: ComposedState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ComposedState]:
        parts = self.begin(x, state, cu_seqlens)
        places = self._places(parts)
        if cu_seqlens is None and len(set(places)) == 1:
            o, parts = self._together(x, parts, places[0])
            return o, self.state(parts)
        return self._apart(x, parts, cu_seqlens, places)

    def _places(self, parts: Parts) -> list[int]:
        """How many tokens of the open segment every sequence has read; attention holds two pairs for each."""
        return [(held - self.spec.persistent) // 2 for held in parts["attention"].memory.weights["length"].tolist()]

    def _apart(self, x: Tensor, parts: Parts, cu_seqlens: Tensor | None, places: list[int]) -> tuple[Tensor, ComposedState]:
        """Sequences that stand at unlike places in their segments, or are packed: one by one."""
        if cu_seqlens is None:
            rows = list(x.split(1))
        else:
            rows = [x[:, a:b] for a, b in pairwise(cu_seqlens.tolist())]
        outputs, states = [], []
        for n, (row, place) in enumerate(zip(rows, places, strict=True)):
            o, own = self._together(row, {name: _row(part, n) for name, part in parts.items()}, place)
            outputs.append(o)
            states.append(own)
        o = torch.cat(outputs, 0 if cu_seqlens is None else 1)
        return o, self.state({name: _joined([own[name] for own in states]) for name in parts})

    def _together(self, x: Tensor, parts: Parts, place: int) -> tuple[Tensor, Parts]:
        outputs, done = [], 0
        while done < x.shape[1]:
            piece = x[:, done : done + self.spec.segment - place]
            o, parts = self._read(piece, parts)
            outputs.append(o)
            done, place = done + piece.shape[1], place + piece.shape[1]
            if place == self.spec.segment:
                place = 0
                attention = self._open_segment(x.shape[0], x.device, x.dtype)
                reader = replace(parts["reader"], memory=_frozen(parts["memory"].memory))
                parts = {"memory": parts["memory"], "attention": attention, "reader": reader}
        return torch.cat(outputs, 1) if outputs else x, parts

    def _read(self, x: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """Tokens of one segment: x [B, t, d_model], t <= C."""
        h, reader = self.memory.recall(x, parts["reader"])
        both = torch.stack([h, x], 2).flatten(1, 2)  # h_1 x_1 h_2 x_2 ...: causal attention over it hides h_s from x_t, t < s
        y, attention = self.attention.run(both, parts["attention"], None)
        y = y[:, 1::2]
        m, memory = self.memory.run(y, parts["memory"], None)
        return self.o_proj(self.gate(y, m)), {"memory": memory, "attention": attention, "reader": reader}


def _frozen(memory: State) -> State:
    """What of a memory a reader needs: no mini-batch is open in it."""
    return replace(memory, mini_batch={})


def _row(state: MixerState, n: int) -> MixerState:
    return state._map(lambda t: t[n : n + 1])


def _joined(states: list[MixerState]) -> MixerState:
    """One state of several, along the batch axis; caches are padded to the longest."""
    trees = [state._trees() for state in states]
    size = max(tree["memory"]["weights"]["k"].shape[2] for tree in trees) if "length" in trees[0]["memory"]["weights"] else 0

    def join(name: str, items: list[Any]) -> Any:
        if isinstance(items[0], dict):
            return {key: join(key, [item[key] for item in items]) for key in items[0]}
        if size and name in ("k", "v"):
            items = [F.pad(item, (0, 0, size - item.shape[2], 0)) for item in items]
        return torch.cat(items)

    return states[0]._with(join("", trees))
