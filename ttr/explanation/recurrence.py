"""The lines of mathematics: what happens at a token, composed from the probed coefficients and the pieces' own functions.

W: [dk, dv] is a head's memory, k, q: [dk], v, o, e: [dv]; ⊙ is elementwise, Diag(a) a factor per channel.
"""

from __future__ import annotations

from typing import Any

from ..inner_optim import Signals, Solver
from ..spec import Spec
from .coefficients import Probe, gate_symbol, probe, signal_symbol, step_rule_line, written_out
from .symbols import Symbol
from .terms import Terms, join, outer, times, transposed


def recurrence(spec: Spec) -> tuple[str, ...]:
    """The update and the readout of a declaration, line by line."""
    if spec.regressor.family == "kernel":
        return _kernel(spec)
    if spec.regressor.family == "least_squares":
        return _least_squares(spec)
    return _trained(spec)


def slot_letters(slots: tuple[str, ...]) -> list[str]:
    """A capital letter for every slot: W for the weights, else its initial, or its name where that is taken."""
    letters: list[str] = []
    for slot in slots:
        letter = "W" if slot == "weights" else slot[0].upper()
        letters.append(slot if letter in letters else letter)
    return letters


def _kernel(spec: Spec) -> tuple[str, ...]:
    regressor: Any = spec.regressor
    seen = "i ≤ t" if regressor.window is None else f"t - {regressor.window} < i ≤ t"
    seen += f" and i < {regressor.prefix}" if regressor.prefix else ""
    return (f"aₜᵢ = softmaxᵢ({_scaled_query('qₜᵀ kᵢ', spec)}),  {seen}", "oₜ = Σᵢ aₜᵢ vᵢ")


def _least_squares(spec: Spec) -> tuple[str, ...]:
    regressor: Any = spec.regressor
    weight = regressor.weight
    gamma = Symbol.lift(weight.value) if weight.constant else Symbol.named(signal_symbol("weight", "ₜ"))
    gated, per_key, before = spec.gate.decays, spec.gate.per_key, spec.read.at == "before"
    alpha = gate_symbol(spec, "ₜ") if gated else ""
    w = "" if gamma == 1 else f"{gamma} "
    at = "ₜ₋₁" if before else "ₜ"
    keep = {False: f"{alpha} {{}}ₜ₋₁" if gated else "{}ₜ₋₁", True: f"Diag({alpha}) {{}}ₜ₋₁"}[per_key]
    H = f"Diag({alpha})^½ Hₜ₋₁ Diag({alpha})^½" if per_key else keep.format("H")
    lines = [f"Gₜ = {keep.format('G')} + {w}kₜ vₜᵀ", f"Hₜ = {H} + {w}kₜ kₜᵀ"]
    ridge = "Λ"
    if regressor.ridge_decays and gated:
        lines.append(f"Λₜ = {alpha} {'⊙ ' if per_key else ''}Λₜ₋₁,  Λ₀ = Λ")
        ridge = f"Λ{at}"
    lines.append(f"xₜ = (H{at} + {ridge})⁻¹ {_scaled_query('qₜ', spec)}{_solver(spec)}")
    return (*lines, f"oₜ = G{at}ᵀ xₜ")


def _solver(spec: Spec) -> str:
    optimizer = spec.optimizer
    how = {
        "cholesky": "factored at every token",
        "rls": "the inverse is carried from token to token",
        "cg": f"{getattr(optimizer, 'iterations', '')} steps of conjugate gradients from 0",
    }.get(optimizer.kind, optimizer.kind)
    return f"      ({how})"


def _scaled_query(text: str, spec: Spec) -> str:
    if spec.read.scale is None and spec.scale(4) == 0.5:
        return f"{text} / √dk"
    scale = spec.scale(4)
    return text if scale == 1 else f"{Symbol.lift(scale)} {text}"


def _trained(spec: Spec) -> tuple[str, ...]:
    assert not isinstance(spec.optimizer, Solver)
    writer = _Writer(spec)
    lines = writer.preamble()
    found = writer.probe
    if found is None:
        update = [writer.gradient(), *writer.other_update()]
    elif written_out(spec):
        update = [*writer.error(found), *writer.slots(found)]
    else:
        update = [writer.gradient(), *writer.slots(found)]
    return (*lines, *writer.loop(update), *writer.readout())


class _Writer:
    """The lines of a trained regressor. Within a token of several micro-steps the subscript is j, else t."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.many = spec.steps > 1
        self.now = "ⱼ" if self.many else "ₜ"
        self.before = "ⱼ₋₁" if self.many else "ₜ₋₁"
        self.probe = probe(spec, self.now)
        self.letters = slot_letters(("weights", *spec.optimizer.slots))

    def preamble(self) -> list[str]:
        """What f, the loss and a rescaled step are."""
        lines = [] if written_out(self.spec) else [f"f(x) = {self._model()}", f"ℓ(f, v) = {self._loss()}"]
        mirror = self.spec.optimizer.mirror
        lines += [] if mirror.identity else [f"{mirror.kind}: {summary(mirror)}"]
        rule = step_rule_line(self.spec, self.now)
        return lines if rule is None else [*lines, rule]

    def _mirrored(self, weights: str) -> str:
        mirror = self.spec.optimizer.mirror
        return weights if mirror.identity else f"{mirror.kind}({weights})"

    def _model(self) -> str:
        """The regressor's own function on symbols."""
        regressor = self.spec.regressor
        try:
            weights = {name: Symbol.named(name) for name in regressor.init(8, 8)}
            return str(Symbol.lift(regressor.predict(weights, Symbol.named("x"))))  # type: ignore[arg-type]
        except Exception:  # a function that no symbol goes through: its docstring says what it is
            return summary(regressor)

    def _loss(self) -> str:
        objective = self.spec.objective
        signals = {
            n: Symbol.named(signal_symbol(n)) if s.constant is False else Symbol.lift(s.value) for n, s in objective.signals().items()
        }
        try:
            return str(objective.loss(Symbol.named("f"), Symbol.named("v"), Signals(signals)))  # type: ignore[arg-type]
        except Exception:  # as in `_model`
            return summary(objective)

    def combination(self, row: tuple[Symbol, ...], matrices: list[str]) -> Terms:
        return [times(c, m, self._axes(c)) for c, m in zip(row, matrices, strict=True) if c != 0]

    def _axes(self, c: Symbol) -> set[str]:
        per = self.probe.per if self.probe is not None else {}
        return {per.get(name, "head") for name in c.names} & {"key", "value"}

    def _matrices(self, subscript: str) -> list[str]:
        return [f"{letter}{subscript}" for letter in self.letters]

    def _target(self, found: Probe) -> str:
        v = f"v{self.now}"
        return v if found.ratio == 1 else f"{found.ratio} {v}"

    def error(self, found: Probe) -> list[str]:
        """e = prediction - target; nothing where the update does not look at the prediction."""
        if not found.solve:
            return []
        look = transposed(self.combination(found.c, self._matrices(self.before)))
        target = "" if found.known is not None else f" - {self._target(found)}"
        return [f"e{self.now} = {look} k{self.now}{target}"]

    def gradient(self) -> str:
        spec = self.spec
        frozen = spec.mini_batch != 1
        at = "⋆" if frozen else self.before
        gated_look = spec.gate.order == "first" and spec.gate.decays and not frozen
        if self.probe is not None:
            point = join(self.combination(self.probe.c, self._matrices(at)))
        elif gated_look:
            point = f"{gate_symbol(spec, self.now)} W{at}"
        else:
            point = f"W{at}"
        batch = "sequence" if spec.mini_batch == "sequence" else f"mini-batch of {spec.mini_batch} tokens"
        note = f"      (⋆: as the {batch} began)" if frozen else ""
        if spec.window > 1:
            weight = spec.objective.window_weight
            omega = f"{Symbol.lift(weight.value)} " if weight.constant else f"{signal_symbol('window_weight', 'ₜᵢ')} "
            each = f"Σᵢ {'' if omega == '1 ' else omega}∂ℓ(f(kᵢ; W), vᵢ)/∂W"
            return f"gₜ = {each} at W = {self._mirrored(point)},  t - {spec.window} < i ≤ t{note}"
        return f"g{self.now} = ∂ℓ(f(k{self.now}; W), v{self.now})/∂W at W = {self._mirrored(point)}{note}"

    def slots(self, found: Probe) -> list[str]:
        """One line per slot; a slot that moves by what another one just did says so."""
        old, new = self._matrices(self.before), self._matrices(self.now)
        base, shared = _shared_rows(found)
        order = [base, *(i for i in range(len(new)) if i != base)]
        lines = []
        for i in order:
            if i in shared:
                factor, rest = shared[i]
                terms = [*self.combination(rest, old), times(factor, new[base], self._axes(factor))]
            else:
                terms = [*self.combination(found.A[i], old), *self._writes(found, i)]
            lines.append(f"{new[i]} = {join(terms)}")
        return lines

    def _writes(self, found: Probe, i: int) -> Terms:
        b, k = found.b[i], f"k{self.now}"
        terms: Terms = []
        if b != 0:
            if not written_out(self.spec):
                terms.append(times(b, f"g{self.now}", self._axes(b)))
            elif found.solve:
                terms.append(outer(b, k, f"e{self.now}", self._axes(b)))
            else:
                terms.append(outer(-b, k, f"v{self.now}", self._axes(b)))
        if found.known is not None and found.known[i] != 0:
            terms.append(outer(found.known[i], f"k̃{self.now}", f"v{self.now}", self._axes(found.known[i])))
        return terms

    def other_update(self) -> list[str]:
        """An optimizer that is not linear: its update on symbols, or what its docstring says."""
        optimizer = self.spec.optimizer
        old, new = self._matrices(self.before), self._matrices(self.now)
        alpha = gate_symbol(self.spec, self.now)
        gates = [self.spec.gate.decays and d for d in optimizer.decayed_slots()]
        values = {
            n: Symbol.lift(s.value) if s.constant else Symbol.named(signal_symbol(n, self.now)) for n, s in optimizer.signals().items()
        }
        try:
            z = tuple(Symbol.named(alpha) * Symbol.named(m) if g else Symbol.named(m) for m, g in zip(old, gates, strict=True))
            out = optimizer.update(z, Symbol.named(f"g{self.now}"), Signals(values))  # type: ignore[arg-type]
            return [f"{m} = {x}" for m, x in zip(new, out, strict=True)]
        except Exception:  # as in `_model`
            gate = f"{alpha} {old[0]}, then " if gates[0] else ""
            return [f"{new[0]} = {gate}{optimizer.kind}: {summary(optimizer)}"]

    def loop(self, update: list[str]) -> list[str]:
        spec = self.spec
        if spec.gate.projects:
            update = [*update, f"then {spec.gate.kind}: {summary(spec.gate)}"]
        if spec.optimizer.accumulate:
            update = [*update, f"(the weighted g of the {spec.mini_batch} tokens of a mini-batch are summed, then one update is made)"]
        if not self.many:
            return update
        n = str(spec.steps).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
        bounds = ", ".join(f"{m}₀ = {m}ₜ₋₁, {m}ₜ = {m}{n}" for m in self.letters)
        gate = "" if not spec.gate.decays else f"; {gate_symbol(spec, '₁')} = {gate_symbol(spec, 'ₜ')}, then {gate_symbol(spec, 'ⱼ')} = 1"
        return [f"for j = 1, …, {spec.steps}:      ({bounds}{gate})", *(f"  {line}" for line in update)]

    def readout(self) -> list[str]:
        spec = self.spec
        at = "ₜ₋₁" if spec.read.at == "before" else "ₜ"
        found = self.probe if not self.many else probe(spec, "ₜ")
        matrices = [f"{letter}{at}" for letter in self.letters]
        terms: Terms = [("+", matrices[0])] if found is None else self.combination(found.read, matrices)
        if spec.optimizer.accumulate:
            terms = [("+", "W⋆")]
        lines = []
        if spec.optimizer.position != "none":
            share = "1/i" if spec.optimizer.position == "mean" else "max(0, 1/i + δᵢ)"
            lines.append(f"Rₜ = W⋆ + {share} (Wₜ - W⋆)      (i: the token's place in its mini-batch)")
            terms = [("+", "Rₜ")]
        if not spec.regressor.linear or not spec.optimizer.mirror.identity:
            return [*lines, f"oₜ = f({_scaled_query('qₜ', spec)}; W = {self._mirrored(join(terms))})"]
        read = f"{transposed(terms)} {_scaled_query('qₜ', spec)}"
        if spec.read.normalizer == "none":
            return [*lines, f"oₜ = {read}"]
        lines.append("nₜ = the same as W with v = 1      ([dk], one more value column)")
        below = read.replace("W", "n")
        divisor = f"({below} + {spec.read.eps:g})" if spec.read.normalizer == "sum" else f"max(|{below}|, 1)"
        above = f"({read})" if " / " in read else read
        return [*lines, f"oₜ = {above} / {divisor}"]


def _shared_rows(found: Probe) -> tuple[int, dict[int, tuple[Symbol, tuple[Symbol, ...]]]]:
    """The slot others follow, and for each of those (s, rest): new_i = rest . old + s new_base, where that is shorter."""
    r = len(found.slots)
    best: tuple[int, dict] = (0, {})
    saved = 0
    for base in range(r):
        if found.b[base] == 0 or len(found.b[base].terms) != 1:
            continue
        shared, gain = {}, 0
        for i in range(r):
            if i == base or found.b[i] == 0 or (found.known is not None and found.known[i] != found.known[base]):
                continue
            s = found.b[i] / found.b[base]
            rest = tuple(a - s * a_base for a, a_base in zip(found.A[i], found.A[base], strict=True))
            before = sum(len(a.terms) for a in found.A[i]) + len(found.b[i].terms)
            after = sum(len(a.terms) for a in rest) + len(s.terms)
            if after < before or (after == before and rest[base] == 0):
                shared[i], gain = (s, rest), gain + before - after + 1
        if gain > saved:
            best, saved = (base, shared), gain
    return best


def summary(piece) -> str:
    """The first paragraph of a piece's docstring."""
    text = (type(piece).__doc__ or type(piece).__name__).strip().split("\n\n")[0]
    return " ".join(text.split()).rstrip(".")
