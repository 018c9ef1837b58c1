"""The per-token quantities of a declaration: what they are called, along which axis they vary, where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from ..signals import Mamba, Signal
from ..spec import Spec
from .coefficients import gate_symbol, rescaled, signal_symbol, step_symbol
from .recurrence import summary
from .symbols import Symbol

SOURCES = {"x": "x", "shift": "shift(x)", "qkv": "[q, k, v]", "v": "v"}
AXES = {
    "head": "per head",
    "key": "per key channel",
    "value": "per value channel",
    "tensor": "per weight tensor",
    "window": "per pair of the window",
}


@dataclass(frozen=True)
class SignalNote:
    """symbol: in the formulas. value: how a layer makes it. constant: the number, if it is one and not per token."""

    name: str
    symbol: str
    per: str
    value: str
    constant: float | None = None


def signal_notes(spec: Spec) -> tuple[SignalNote, ...]:
    """Every signal of a declaration, and the decay of a gate that computes its own."""
    notes = []
    for name, s in spec.signals().items():
        symbol = gate_symbol(spec) if name == "log_decay" else signal_symbol(name)
        notes.append(SignalNote(name, symbol, s.per, _value(s, spec), s.value))
    if spec.gate.decays and "log_decay" not in spec.signals():
        decay = getattr(spec.gate, "decay", None)
        value = f"{spec.gate.kind} {decay}" if decay is not None else f"{spec.gate.kind}: {summary(spec.gate)}"
        notes.append(SignalNote("log_decay", gate_symbol(spec), "key" if spec.gate.per_key else "head", value))
    return tuple(notes)


def legend(spec: Spec, note: SignalNote) -> str:
    """`β = step, per head: sigmoid(w x)`; a decay's symbol is the factor that is kept."""
    if note.name == "log_decay":
        return f"{note.symbol} = exp(log_decay), {AXES[note.per]}: log_decay = {note.value}"
    taken = f", taken as {step_symbol(spec)}" if note.name == "step" and rescaled(spec) else ""
    if note.constant is not None:
        return f"{note.symbol} = {note.name}: the number {note.value}{taken}"
    return f"{note.symbol} = {note.name}, {AXES[note.per]}: {note.value}{taken}"


def _value(s: Signal, spec: Spec) -> str:
    if s.constant:
        return f"{s.value:g}"
    if s.tie is not None:
        gate = spec.signals().get("log_decay")
        inner = gate.map if gate is not None and isinstance(gate.map, Mamba) else Mamba()
        return f"{_scaled(s, inner.dt_of(_pre_activation(gate or s), _constants(inner)))}, the gate's own time step"  # type: ignore[arg-type]
    try:
        return _scaled(s, s.map(_pre_activation(s), _constants(s.map)))  # type: ignore[arg-type]
    except Exception:  # a map that no symbol goes through
        return _scaled(s, Symbol.named(f"{s.map.kind}({_pre_activation(s)})"))


def _scaled(s: Signal, value) -> str:
    return str(Symbol.lift(value) * s.scale)


def _constants(map_) -> dict[str, Symbol]:
    return {name: Symbol.named(name) for name in map_.init_params(1, 1)}


def _pre_activation(s: Signal) -> Symbol:
    """cap(w source + bias) as a symbol."""
    source = SOURCES[s.source]
    if s.rank is None:
        z = Symbol.named(f"w {source}")
    else:
        inner = f"w₁ {source}" if s.rank_activation == "none" else f"{s.rank_activation}(w₁ {source})"
        z = Symbol.named(f"w₂ {inner}")
    if s.bias is not None:
        z = z + Symbol.named("b")
    return z if s.softcap is None else s.softcap * (z / s.softcap).tanh()
