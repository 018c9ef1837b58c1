"""A, b, c and the read row in symbols: the optimizer's own functions on unit vectors, as lowering probes them.

    e_i = x_i^T (sum_k c_k z_k) - v_i,   z_i = A z_{i-1} + b (x) w_i e_i,   o_t = q_t^T (sum_k read_k z_k)

Lowering puts numbers through the functions, this module puts symbols through them, and then compares the two. An
optimizer whose functions a symbol cannot go through is described by what each number depends on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..inner_optim import Optimizer, Signals
from ..lowering import coefficients as probe_numbers
from ..objectives import slopes
from ..spec import Spec
from .symbols import NotSymbolic, Symbol, Values

GREEK = {"step": "β", "momentum": "η", "weight": "γ", "threshold": "δ", "window_weight": "ω", "log_decay": "α"}
DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
Row = tuple[Symbol, ...]


@dataclass(frozen=True)
class Coefficients:
    """The canonical recurrence's coefficients as text, over the slots z = (weights, ...).

    A[i][j]: what slot j passes on to slot i, the gate included. b: what the error (or, for a gradient that is not
    written out, the gradient) adds. c: where the prediction or the gradient is taken. read: what the query sees.
    known: what a separate write key adds, or None. form: the equations they stand in. symbolic: False where only the
    numbers' dependence is known.
    """

    form: str
    slots: tuple[str, ...]
    A: tuple[tuple[str, ...], ...]
    b: tuple[str, ...]
    c: tuple[str, ...]
    read: tuple[str, ...]
    known: tuple[str, ...] | None = None
    symbolic: bool = True


@dataclass(frozen=True)
class Probe:
    """Coefficients as symbols. per: the axis each name varies along. solve: e depends on z. ratio: e subtracts ratio v."""

    slots: tuple[str, ...]
    A: tuple[Row, ...]
    b: Row
    c: Row
    read: Row
    per: dict[str, str]
    known: Row | None = None
    solve: bool = True
    ratio: Symbol = field(default_factory=lambda: Symbol.lift(1))
    symbolic: bool = True

    def text(self, form: str) -> Coefficients:
        def words(row: Row) -> tuple[str, ...]:
            return tuple(str(x) for x in row)

        return Coefficients(
            form=form, slots=self.slots, A=tuple(words(row) for row in self.A), b=words(self.b), c=words(self.c), read=words(self.read),
            known=None if self.known is None else words(self.known), symbolic=self.symbolic,
        )  # fmt: skip


def signal_symbol(name: str, subscript: str = "") -> str:
    return GREEK.get(name, name) + subscript


def rescaled(spec: Spec) -> bool:
    """Whether a step rule makes another step of the declared one."""
    return isinstance(spec.optimizer, Optimizer) and spec.optimizer.step_rule.kind != "plain"


def step_symbol(spec: Spec, subscript: str = "") -> str:
    """The step that is taken: primed where it is not the declared one."""
    return f"{GREEK['step']}{'′' if rescaled(spec) else ''}{subscript}"


def gate_symbol(spec: Spec, subscript: str = "") -> str:
    """The factor the gate keeps; without a subscript where it is the same at every token (not at every micro-step)."""
    same = subscript == "ₜ" and all(s.constant for s in spec.gate.signals().values())
    return GREEK["log_decay"] + ("" if same else subscript)


def probe(spec: Spec, subscript: str = "") -> Probe | None:
    """The coefficients of a linear optimizer, the gate and the quadratic objective composed in; None for others.

    Where the gradient is not written out (no linear regressor, no quadratic objective, frozen gradients) b multiplies
    the gradient and the objective has no part in it.
    """
    optimizer = spec.optimizer
    if not isinstance(optimizer, Optimizer) or not optimizer.linear:
        return None
    values, per = _signal_symbols(spec, subscript)
    keep = None if not spec.gate.decays else gate_symbol(spec, subscript)
    if keep is not None:
        per[keep] = "key" if spec.gate.per_key else "head"
    look_first = spec.gate.order == "first" and spec.mini_batch == 1 and not optimizer.accumulate
    try:
        found = _symbols(optimizer, values, keep, look_first)
        agrees = _agrees(found, spec, values, keep, look_first)
    except Exception:  # a user's function may fail on a symbol in any way; the numbers are still there
        agrees = False
    if not agrees:
        found = _dependence(spec, values, keep, look_first)
    found = replace(found, per=per)
    if not written_out(spec):
        return found
    curvature, gain = slope_symbols(spec)
    known = None
    if spec.separate_write_key:
        known = _known(spec, values, gain)
    solve = curvature != 0
    scale = curvature if solve else gain
    ratio = gain / curvature if solve else Symbol.lift(1)
    return replace(found, b=tuple(x * scale for x in found.b), known=known, solve=solve, ratio=ratio)


def coefficients(spec: Spec) -> Coefficients | None:
    """`probe` as text, with the equations the coefficients stand in."""
    found = probe(spec)
    if found is None:
        return None
    if not written_out(spec):
        return found.text("g = ∂ℓ/∂W at W = c z,  z ← A z + b g,  o = f(q; W = read z)")
    v = "v" if found.ratio == 1 else f"{found.ratio} v"
    error = f"e = (c z)ᵀ k - {v}" if found.known is None else "e = (c z)ᵀ k"
    write = " + b̃ k̃ vᵀ" if found.known is not None else ""
    return found.text(f"{error if found.solve else 'e = -v'},  z ← A z + b k eᵀ{write},  o = (read z)ᵀ q")


def written_out(spec: Spec) -> bool:
    """True when the gradient has the closed form w (x) (z^T x - v)."""
    return spec.regressor.linear and spec.objective.quadratic and spec.mini_batch == 1 and spec.optimizer.mirror.identity


def _signal_symbols(spec: Spec, subscript: str) -> tuple[dict[str, Symbol], dict[str, str]]:
    """The optimizer's signals as symbols, or as the number that is declared, and the axis of each symbol."""
    values, per = {}, {}
    for name, s in spec.optimizer.signals().items():
        word = step_symbol(spec, subscript) if name == "step" else signal_symbol(name, subscript)
        if s.constant and not (name == "step" and rescaled(spec)):
            values[name] = Symbol.lift(s.value)
        else:
            values[name] = Symbol.named(word)
            per[word] = s.per
    return values, per


def _symbols(optimizer: Optimizer, values: dict[str, Symbol], keep: str | None, look_first: bool) -> Probe:
    s = Signals(values)  # type: ignore[arg-type]
    r = 1 + len(optimizer.slots)
    zero, one = Symbol.lift(0), Symbol.lift(1)
    units = [tuple(one if i == j else zero for i in range(r)) for j in range(r)]
    factor = [Symbol.named(keep) if keep is not None and d else one for d in optimizer.decayed_slots()]

    def row(symbols) -> Row:
        return tuple(Symbol.lift(x) for x in symbols)

    columns = [row(optimizer.update(z, zero, s)) for z in units]  # type: ignore[arg-type]
    look = row(optimizer.point(z, s) for z in units)  # type: ignore[arg-type]
    return Probe(
        slots=("weights", *optimizer.slots),
        A=tuple(tuple(columns[j][i] * factor[j] for j in range(r)) for i in range(r)),
        b=row(optimizer.update((zero,) * r, one, s)),  # type: ignore[arg-type]
        c=tuple(x * f for x, f in zip(look, factor, strict=True)) if look_first else look,
        read=row(optimizer.read(z, s) for z in units),  # type: ignore[arg-type]
        per={},
    )


def _numbers(spec: Spec, draws: dict[str, float], keep: float | None, look_first: bool):
    """Lowering's own coefficients of one event where the signals have these values: tensors [.., 1, 1] as floats."""
    lead = (1, 1, 1, 1)
    values = {name: torch.full((*lead, 1, 1), x, dtype=torch.float64) for name, x in draws.items()}
    factor = None if keep is None else torch.full((*lead, 1, 1), keep, dtype=torch.float64)
    found = probe_numbers(spec, values, factor, lead, look_first)
    r = found.A.shape[0]
    return [*found.A.reshape(-1).tolist(), *(x for row in (found.b, found.c, found.read) for x in row.reshape(r).tolist())]


def _draws(spec: Spec, values: dict[str, Symbol], seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    random = {name: float(torch.rand((), generator=generator, dtype=torch.float64)) + 0.1 for name in values}
    return {name: random[name] if x.constant is None else x.constant for name, x in values.items()}


def _agrees(found: Probe, spec: Spec, values: dict[str, Symbol], keep: str | None, look_first: bool) -> bool:
    """Whether the symbols have the values that lowering computes with."""
    draws = _draws(spec, values, 0)
    at: Values = {str(x): torch.tensor(draws[name], dtype=torch.float64) for name, x in values.items() if x.constant is None}
    if keep is not None:
        at[keep] = torch.tensor(0.7, dtype=torch.float64)
    symbols = [*(x for row in found.A for x in row), *found.b, *found.c, *found.read]
    got = [float(x.at(at)) for x in symbols]
    expected = _numbers(spec, draws, None if keep is None else 0.7, look_first)
    return all(abs(x - y) <= 1e-9 * max(1.0, abs(y)) for x, y in zip(got, expected, strict=True))


def _dependence(spec: Spec, values: dict[str, Symbol], keep: str | None, look_first: bool) -> Probe:
    """Every coefficient as a number where it is one, else as a name that lists the signals it moves with."""
    base = _draws(spec, values, 1)
    kept = None if keep is None else 0.7
    start = _numbers(spec, base, kept, look_first)
    moved = {
        str(x): _numbers(spec, {**base, name: base[name] + 0.37}, kept, look_first)
        for name, x in values.items() if x.constant is None
    }  # fmt: skip
    if keep is not None:
        moved[keep] = _numbers(spec, base, 0.4, look_first)

    def entry(index: int, label: str) -> Symbol:
        names = [name for name, numbers in moved.items() if abs(numbers[index] - start[index]) > 1e-12]
        return Symbol.named(f"{label}({', '.join(names)})") if names else Symbol.lift(round(start[index], 12))

    r = 1 + len(spec.optimizer.slots)

    def row(offset: int, label: str) -> Row:
        return tuple(entry(r * (r + offset) + i, f"{label}{i + 1}".translate(DIGITS)) for i in range(r))

    A = tuple(tuple(entry(i * r + j, f"A{i + 1}{j + 1}".translate(DIGITS)) for j in range(r)) for i in range(r))
    b, c, read = row(0, "b"), row(1, "c"), row(2, "read")
    return Probe(slots=("weights", *spec.optimizer.slots), A=A, b=b, c=c, read=read, per={}, symbolic=False)


def _known(spec: Spec, values: dict[str, Symbol], gain: Symbol) -> Row:
    """What a separate write key adds: the second term's update, which the step does not touch."""
    optimizer = spec.optimizer
    zero = (Symbol.lift(0),) * (1 + len(optimizer.slots))
    s = Signals({**values, "step": Symbol.lift(1)})  # type: ignore[dict-item]
    try:
        return tuple(-gain * Symbol.lift(x) for x in optimizer.update(zero, Symbol.lift(1), s))  # type: ignore[arg-type]
    except Exception:  # as in `probe`
        return tuple(Symbol.named(f"b′{i + 1}".translate(DIGITS)) for i in range(len(zero)))


def slope_symbols(spec: Spec) -> tuple[Symbol, Symbol]:
    """Curvature and gain of a quadratic objective; dv where they shrink with the number of value channels."""
    found = []
    for small, large in zip(slopes(spec.objective, 2), slopes(spec.objective, 4), strict=True):
        if small == large:
            found.append(Symbol.lift(small))
        elif abs(small - 2 * large) < 1e-12:
            found.append(Symbol.lift(2 * small) / Symbol.named("dv"))
        else:
            raise NotSymbolic(f"objective {spec.objective.kind!r} depends on dv in a way that has no symbol")
    return found[0], found[1]


def step_rule_line(spec: Spec, subscript: str) -> str | None:
    """How the step that is taken follows from the declared one, or None where it is the declared one."""
    if not rescaled(spec):
        return None
    rule, declared = spec.optimizer.step_rule, spec.optimizer.step
    step = Symbol.lift(declared.value) if declared.constant else Symbol.named(signal_symbol("step", subscript))
    curvature = slopes(spec.objective, 2)[0]
    try:
        taken = str(Symbol.lift(rule.effective(step, Symbol.named(f"k{subscript}"), curvature)))  # type: ignore[arg-type]
    except Exception:  # as in `probe`
        taken = f"{rule.kind}({step}, k{subscript})"
    return f"{step_symbol(spec, subscript)} = {taken}"
