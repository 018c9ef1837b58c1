"""Where a declaration sits among the published ones: the same mathematics, or which slots differ.

Mathematics is what `ttr.regress` sees: pieces, constants, and the axis of every signal. How a signal is projected, the
layer around it and the name do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from ..objectives import slopes
from ..signals import Signal
from ..spec import Spec, presets
from ..spec import spec as read_spec

SLOTS = ("regressor", "objective", "optimizer", "gate", "read")
INITIAL = ("weight_std", "ridge")  # where a learned constant begins; not what is done with it
KIND = {"regressor": 4.0, "objective": 2.0, "optimizer": 2.0, "gate": 2.0, "read": 0.0}  # how far another kind is
FIELD = {"read.scale": 0.5, "regressor.family": 3.0}  # how far another value of a field is; 1 unless it is here
FAR = 2.0  # a neighbour this much further away than the nearest is not worth naming
Fields = dict[str, Any]


@dataclass(frozen=True)
class Neighbour:
    """A published declaration and what is different here, slot by slot: `gate vector instead of scalar`."""

    preset: str
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.preset} with {', '.join(self.differences)}"


@dataclass(frozen=True)
class Place:
    """presets: those with the same mathematics, the closest layer first. neighbours: the nearest others."""

    presets: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]
    signals: tuple[str, ...]  # how the signals of presets[0] differ


def place(spec: Spec, count: int = 3) -> Place:
    """Compare a declaration with every preset."""
    own = mathematics(spec)
    same, others = [], []
    for name in presets():
        words, distance = _differences(own, _of_preset(name))
        if words:
            others.append((distance, name, Neighbour(name, tuple(words))))
        else:
            same.append(name)
    same.sort(key=lambda name: (name != spec.name, spec != read_spec(name), spec.layer != read_spec(name).layer, name))
    others.sort(key=lambda item: item[:2])
    near = [n for distance, _, n in others[:count] if distance <= others[0][0] + FAR]
    return Place(tuple(same), tuple(near), _signal_differences(spec, read_spec(same[0])) if same else ())


@cache
def _of_preset(name: str) -> dict[str, Fields]:
    return mathematics(read_spec(name))


def mathematics(spec: Spec) -> dict[str, Fields]:
    """{slot: {field: what it means}}, fields without an effect left out."""
    out = {slot: _fields(getattr(spec, slot)) for slot in SLOTS}
    looks = spec.objective is not None and not (spec.objective.quadratic and slopes(spec.objective, 2)[0] == 0)
    if not spec.gate.decays or spec.mini_batch != 1 or not looks:
        out["gate"].pop("order", None)  # the gradient does not depend on the weights, or is taken at older ones
    out["read"]["scale"] = "dk^-1/2" if spec.scale(4) == 0.5 and spec.read.scale is None else spec.scale(4)
    if spec.read.normalizer == "none":
        out["read"].pop("eps", None)
    out["regressor"]["family"] = spec.regressor.family
    return out


def _fields(piece: Any) -> Fields:
    if piece is None:
        return {"kind": "none"}
    own = {f.name.removesuffix("_signal"): _meaning(getattr(piece, f.name)) for f in fields(piece) if f.init and f.name not in INITIAL}
    return {"kind": piece.kind, **own} if hasattr(piece, "kind") else own


def _meaning(value: Any) -> Any:
    if isinstance(value, Signal):
        return f"{value.value:g}" if value.constant else f"per {value.per}"
    if is_dataclass(value):
        inner = _fields(value)
        return inner["kind"] if list(inner) == ["kind"] else tuple(sorted(inner.items()))
    return value


def _differences(own: dict[str, Fields], other: dict[str, Fields]) -> tuple[list[str], float]:
    """Words for everything that differs, and how far apart the two are."""
    kinds, words, distance = [], [], 0.0
    delta_is_sgd = {own["optimizer"]["kind"], other["optimizer"]["kind"]} == {"sgd", "delta"}
    inner_product = "dot" in (own["objective"]["kind"], other["objective"]["kind"])
    for slot in SLOTS:
        a, b = own[slot], other[slot]
        kind, theirs = a.get("kind"), b.get("kind")
        if delta_is_sgd and slot == ("objective" if inner_product else "optimizer"):
            kind = theirs  # delta is sgd on l2: one difference, not two
        if kind != theirs:
            label = "" if slot == "optimizer" and "none" not in (kind, theirs) else f"{slot} "
            kinds.append(f"{label}{kind} instead of {theirs}")
            distance += KIND[slot]
        for name in sorted(a.keys() & b.keys() - {"kind"}):
            signal = any(str(x[name]).startswith("per ") for x in (a, b))
            if a[name] != b[name] and not (kind != theirs and signal):  # another kind has other signals
                if name != "family":  # the kind says it
                    words.append(f"{slot}.{name} {_word(a[name])} instead of {_word(b[name])}")
                distance += FIELD.get(f"{slot}.{name}", 1.0)
    return kinds + words, distance


def _word(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(item, tuple) for item in value):  # a piece in a field, as `_meaning` has it
        inner = dict(value)
        return f"{inner.pop('kind')} ({', '.join(f'{name} {_word(x)}' for name, x in inner.items())})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _signal_differences(spec: Spec, other: Spec) -> tuple[str, ...]:
    theirs = other.signals()
    return tuple(name for name, s in spec.signals().items() if s != theirs.get(name))
