"""Lowering: a declaration -> the one canonical recurrence of the linear family, by probing the optimizer.

Per event i (token x micro-step), with slots z = (W, ...) of r matrices:

    E_i = k_i^T (sum_s c_is z_s) - v_i                    (dot: E_i = -v_i, nothing to solve)
    z_i = A_i z_{i-1} + b_i (x) k_i E_i  (+ b'_i (x) k'_i v_i^T, a known write)
    o_t = q_t^T (sum_k read_tk z_k)

The coefficients are numbers per head, or vary per key channel (d1 = dk).
Nobody writes a closed form per mechanism: A, b, c, read are the optimizer's own functions on unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .constant import constant
from .inner_optim import Optimizer, Signals
from .kernels.problem import Problem
from .objectives import slopes
from .registry import SpecError


@dataclass(frozen=True)
class LinearRecurrence:
    """The canonical recurrence over N sequences, H heads, T tokens, n micro-steps.

    A: [r, r, N, H, T, n, d1, d2]; b, c: [r, N, H, T, n, d1, d2]; read: [r, N, H, T, d1, d2]; d1 in (1, dk),
    d2 in (1, dv). k: [N, H, T, n, dk]; v: [N, H, T, n, dv] (what E subtracts; None: E has no target).
    known: (b', k', v) or None. solve: E depends on z. read_before: o_t reads z as it was before token t.
    """

    A: Tensor
    b: Tensor
    c: Tensor
    read: Tensor
    k: Tensor
    v: Tensor | None
    known: tuple[Tensor, Tensor, Tensor] | None
    solve: bool
    read_before: bool

    @property
    def r(self) -> int:
        return self.A.shape[0]


def is_linear(spec) -> bool:
    """True when the declaration lowers to a LinearRecurrence."""
    return (
        spec.regressor.linear
        and isinstance(spec.optimizer, Optimizer)
        and spec.optimizer.linear
        and spec.objective.quadratic
        and spec.mini_batch == 1
        and not spec.gate.projects
        and spec.optimizer.mirror.identity
        and spec.window == 1
    )


@constant
def check_superposition(optimizer: Optimizer) -> None:
    """Catch a false `linear=True`: the three functions must be elementwise and linear in (z, g) for arbitrary signals."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    s = Signals({name: draw(1) for name in optimizer.signals()})
    n = 1 + len(optimizer.slots)
    size = torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4], dtype=torch.float64)  # a threshold may lie anywhere
    z1, z2, (g1, g2) = list(draw(n, 5) * size), list(draw(n, 5) * size), draw(2, 5) * size
    a, b = 0.7, -1.3
    mixed = tuple(a * x + b * y for x, y in zip(z1, z2, strict=True))

    def all_of(z, g):
        return [optimizer.point(z, s), *optimizer.updated(z, g, s), optimizer.read(z, s)]

    together = all_of(mixed, a * g1 + b * g2)
    apart = [a * x + b * y for x, y in zip(all_of(tuple(z1), g1), all_of(tuple(z2), g2), strict=True)]
    names = ["point", *(f"update[{i}]" for i in range(n)), "read"]
    for name, x, y in zip(names, together, apart, strict=True):
        if not torch.allclose(x, y, rtol=1e-9, atol=1e-9):
            raise SpecError(f"optimizer {optimizer.kind!r} says linear=True, but its {name} is not linear in (z, g); set linear=False")
    alone = [torch.cat(x) for x in zip(*(all_of(tuple(w[i : i + 1] for w in z1), g1[i : i + 1]) for i in range(5)), strict=True)]
    for name, x, y in zip(names, all_of(tuple(z1), g1), alone, strict=True):
        if not torch.allclose(x, y, rtol=1e-9, atol=1e-9):
            raise SpecError(f"optimizer {optimizer.kind!r} says linear=True, but its {name} is not elementwise; set linear=False")


def any_signal(*shape: int, seed: int = 0) -> Tensor:
    """What a rule is probed with: 0, and numbers of either sign and any size, for it may be another one over a stretch. Float64."""
    size, sign = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = 10 ** (8 * size - 4) * torch.where(sign < 0.5, -1.0, 1.0)
    drawn.view(-1)[0] = 0.0
    return drawn


def any_signals(names: Iterable[str], *shape: int) -> dict[str, Tensor]:
    """One for every name, each drawn anew."""
    return {name: any_signal(*shape, seed=seed) for seed, name in enumerate(sorted(names))}


@constant
def looks_at_weights(optimizer: Optimizer) -> tuple[bool, bool]:
    """Whether the gradient is taken at the weights themselves, and whether the query reads them: whatever the signals are."""
    z = tuple(torch.rand(1 + len(optimizer.slots), 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    s = Signals(any_signals(optimizer.signals(), 64))
    return torch.equal(optimizer.point(z, s), z[0]), torch.equal(optimizer.read(z, s), z[0])


@constant
def slots_seen(optimizer: Optimizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The slots that `point` and `read` are made of: of the others the factor is zero, whatever the signals are."""
    s = Signals(any_signals(optimizer.signals(), 64))
    units = [tuple(u.expand(64) for u in unit) for unit in torch.eye(1 + len(optimizer.slots), dtype=torch.float64)]
    point, read = (tuple(j for j, z in enumerate(units) if bool((f(z, s) != 0).any())) for f in (optimizer.point, optimizer.read))
    return point or (0,), read or (0,)


@dataclass(frozen=True)
class Coefficients:
    """What an optimizer and a gate do to the slots at every event; leading axes as the signals', d1 and d2 last.

    A: [r, r, *lead, d1, d2], the gate included. b, c, read: [r, *lead, d1, d2] (read as of the token's one event).
    """

    A: Tensor
    b: Tensor
    c: Tensor
    read: Tensor


def coefficients(spec, values: dict[str, Tensor], keep: Tensor | None, lead: tuple[int, ...], look_first: bool) -> Coefficients:
    """Probe the optimizer's three functions on unit vectors.

    values: signal name -> [*lead, d1, d2], the last axis of lead being micro-steps; keep: the gate's factor, likewise.
    look_first: the gradient is taken at the decayed slots.
    """
    optimizer = spec.optimizer
    check_superposition(optimizer)
    s = Signals(values)
    some = next(iter(values.values()))
    one, zero = some.new_ones(()), some.new_zeros(())
    r = 1 + len(optimizer.slots)
    nothing = (zero,) * r
    units = [tuple(one if i == j else zero for i in range(r)) for j in range(r)]
    decayed = optimizer.decayed_slots()

    def gated(x: Tensor, slot: int) -> Tensor:
        return x * keep if decayed[slot] and keep is not None else x

    columns = [optimizer.update(z, zero, s) for z in units]  # columns[j][i]: what slot j leaves in slot i
    A = _common([[gated(columns[j][i], j) for j in range(r)] for i in range(r)])
    c = [optimizer.point(z, s) for z in units]
    if look_first:
        c = [gated(x, j) for j, x in enumerate(c)]
    event = 0 if spec.read.at == "before" else lead[-1] - 1
    at = Signals({name: x[..., event, :, :] for name, x in values.items()})
    return Coefficients(
        A=torch.stack([_stack(row, lead) for row in A]),
        b=_stack(list(optimizer.update(nothing, one, s)), lead),
        c=_stack(c, lead),
        read=_stack([optimizer.read(z, at) for z in units], lead[:-1]),
    )


def lower(problem: Problem) -> LinearRecurrence:
    """Probe the optimizer of a linear declaration and compose gate, order, step rule and objective into one recurrence."""
    spec, optimizer = problem.spec, problem.spec.optimizer
    curvature, gain = slopes(spec.objective, problem.v.shape[-1])
    lead = (*problem.q.shape[:3], spec.steps)
    values = effective_signals(problem)
    probed = coefficients(spec, values, keep_factor(problem), lead, spec.gate.order == "first")
    known = None
    if spec.separate_write_key:
        unit = Signals({**values, "step": torch.ones_like(values["step"])})
        zero, one = problem.q.new_zeros(()), problem.q.new_ones(())
        b_known = optimizer.update((zero,) * (1 + len(optimizer.slots)), one, unit)
        assert problem.write_key is not None
        known = (_stack([-gain * x for x in b_known], lead), problem.write_key, problem.v)
    solve = curvature != 0
    out = LinearRecurrence(
        A=probed.A, b=probed.b * (curvature if solve else gain), c=probed.c, read=probed.read, k=problem.k,
        v=None if spec.separate_write_key else problem.v * (gain / curvature if solve else 1.0),
        known=known, solve=solve, read_before=spec.read.at == "before",
    )  # fmt: skip
    return _only_events(_fold_value_step(out, spec), problem.valid)


def effective_signals(problem: Problem) -> dict[str, Tensor]:
    """The signals with the step that the step rule makes of the declared one."""
    rule, values = problem.spec.optimizer.step_rule, dict(problem.signals)
    if rule.kind != "plain":
        curvature, _ = slopes(problem.spec.objective, problem.v.shape[-1])
        values["step"] = rule.effective(values["step"], problem.k[..., None], curvature)
    return values


def keep_factor(problem: Problem) -> Tensor | None:
    """exp(log_decay) before the first micro-step, 1 before the others: [N, H, T, n, d1, 1]."""
    if problem.log_decay is None:
        return None
    n, keep = problem.spec.steps, torch.exp(problem.log_decay)[:, :, :, None, :, None]
    return keep if n == 1 else torch.cat([keep, torch.ones_like(keep).expand(*keep.shape[:3], n - 1, *keep.shape[4:])], 3)


def _common(rows: list[list[Tensor]]) -> list[list[Tensor]]:
    """Broadcast a matrix of coefficients to one shape, so that its rows stack."""
    shape = torch.broadcast_shapes(*(x.shape for row in rows for x in row))
    return [[x.expand(shape) for x in row] for row in rows]


def _stack(coefficients: list[Tensor], lead: tuple[int, ...]) -> Tensor:
    """[r, *lead, d1, d2] of coefficients that may be plain numbers."""
    tails = [x.shape[-2:] if x.ndim >= 2 else (1, 1) for x in coefficients]
    tail = torch.broadcast_shapes(*tails)
    return torch.stack([x.expand(*lead, *tail) for x in coefficients])


def _fold_value_step(rec: LinearRecurrence, spec) -> LinearRecurrence:
    """With nothing to solve, a step per value channel is a scaled value."""
    if not folds_value_step(spec) or rec.v is None:
        return rec
    first = {name: getattr(rec, name)[..., :1] for name in ("A", "c", "read")}
    return replace(rec, v=rec.v * rec.b[0, ..., 0, :], b=torch.ones_like(rec.b[..., :1]), **first)


def folds_value_step(spec) -> bool:
    """True when the only per-value signal is the step of a slotless rule on `dot` that it enters through b alone."""
    if per_value_signals(spec) != ["step"] or spec.objective.kind != "dot" or spec.optimizer.slots:
        return False
    return step_enters_b_only(spec.optimizer)


@constant
def step_enters_b_only(optimizer: Optimizer) -> bool:
    """Probe whether point, read and the transition of a one-slot rule are free of its step."""
    zero, one = torch.zeros(()), torch.ones(())
    others = {name: torch.tensor(0.3) for name in optimizer.signals()}

    def without_gradient(step: float) -> list[Tensor]:
        s = Signals({**others, "step": torch.tensor(step)})
        return [optimizer.point((one,), s), *optimizer.update((one,), zero, s), optimizer.read((one,), s)]

    return all(torch.equal(x, y) for x, y in zip(without_gradient(0.2), without_gradient(0.9), strict=True))


def _only_events(rec: LinearRecurrence, valid: Tensor | None) -> LinearRecurrence:
    """Tokens behind a sequence's end do nothing: A = 1, b = 0, c = 0."""
    if valid is None:
        return rec
    real = valid[:, None, :, None, None, None]
    eye = torch.eye(rec.r, dtype=rec.A.dtype, device=rec.A.device).view(rec.r, rec.r, 1, 1, 1, 1, 1, 1)
    known = rec.known and (torch.where(real, rec.known[0], 0), *rec.known[1:])
    return replace(rec, A=torch.where(real, rec.A, eye), b=torch.where(real, rec.b, 0), c=torch.where(real, rec.c, 0), known=known)


def per_value_signals(spec) -> list[str]:
    return [name for name, s in spec.signals().items() if s.per == "value"]
