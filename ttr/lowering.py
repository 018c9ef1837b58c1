"""Lowering: a declaration -> the one canonical recurrence of the linear family, by probing the optimizer.

Per event i (token x micro-step), with slots z = (W, ...) of r matrices:

    E_i = x_i^T (sum_k c_ik z_k) - v_i                    (dot: E_i = -v_i, nothing to solve)
    z_i = A_i z_{i-1} + b_i (x) w_i E_i  (+ b'_i (x) k'_i v_i^T, a known write)
    o_t = q_t^T (sum_k read_tk z_k)

x is the look key, w the write key. The coefficients are numbers per head, or vary per key channel (d1 = dk).
Nobody writes a closed form per mechanism: A, b, c, read are the optimizer's own functions on unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .inner_optim import Optimizer, Signals
from .kernels.problem import Problem
from .objectives import slopes
from .registry import SpecError


@dataclass(frozen=True)
class LinearRecurrence:
    """The canonical recurrence over N sequences, H heads, T tokens, n micro-steps.

    A: [r, r, N, H, T, n, d1, d2]; b, c: [r, N, H, T, n, d1, d2]; read: [r, N, H, T, d1, d2]; d1 in (1, dk),
    d2 in (1, dv). x, w: [N, H, T, n, dk]; v: [N, H, T, n, dv] (what E subtracts; None: E has no target).
    known: (b', k', v) or None. solve: E depends on z. read_before: o_t reads z as it was before token t.
    """

    A: Tensor
    b: Tensor
    c: Tensor
    read: Tensor
    x: Tensor
    w: Tensor
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
    )


@lru_cache(maxsize=None)
def check_superposition(optimizer: Optimizer) -> None:
    """Catch a false `linear=True`: the three functions must be linear in (z, g) for arbitrary signals."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    s = Signals({name: draw(1) for name in optimizer.signals()})
    n = 1 + len(optimizer.slots)
    z1, z2, (g1, g2) = list(draw(n, 5)), list(draw(n, 5)), draw(2, 5)
    a, b = 0.7, -1.3
    mixed = tuple(a * x + b * y for x, y in zip(z1, z2, strict=True))

    def all_of(z, g):
        return [optimizer.point(z, s), *optimizer.update(z, g, s), optimizer.read(z, s)]

    together = all_of(mixed, a * g1 + b * g2)
    apart = [a * x + b * y for x, y in zip(all_of(tuple(z1), g1), all_of(tuple(z2), g2), strict=True)]
    names = ["point", *(f"update[{i}]" for i in range(n)), "read"]
    for name, x, y in zip(names, together, apart, strict=True):
        if not torch.allclose(x, y, rtol=1e-9, atol=1e-9):
            raise SpecError(f"optimizer {optimizer.kind!r} says linear=True, but its {name} is not linear in (z, g); set linear=False")


def lower(problem: Problem) -> LinearRecurrence:
    """Probe the optimizer of a linear declaration and compose gate, order, step rule and objective into one recurrence."""
    spec, optimizer = problem.spec, problem.spec.optimizer
    check_superposition(optimizer)
    n = spec.steps
    curvature, gain = slopes(spec.objective, problem.v.shape[-1])
    values = dict(problem.signals)
    if optimizer.step_rule.kind != "plain":
        values["step"] = optimizer.step_rule.effective(values["step"], problem.k[..., None], curvature)
    s = Signals(values)

    N, H, T = problem.q.shape[:3]
    one, zero = problem.q.new_ones(()), problem.q.new_zeros(())
    names = ("weights", *optimizer.slots)
    r = len(names)
    units = [tuple(one if i == j else zero for i in range(r)) for j in range(r)]

    keep = _keep(problem, n)
    decay = [keep if d else None for d in optimizer.decayed_slots()]

    def gated(x: Tensor, slot: int) -> Tensor:
        return x if decay[slot] is None else x * decay[slot]

    columns = [optimizer.update(z, zero, s) for z in units]  # columns[j][i]: what slot j leaves in slot i
    A = [[gated(columns[j][i], j) for j in range(r)] for i in range(r)]
    b = list(optimizer.update(tuple(zero for _ in names), one, s))
    c = [optimizer.point(z, s) for z in units]
    if spec.gate.order == "first":
        c = [gated(x, j) for j, x in enumerate(c)]
    at = Signals({k: x[..., 0 if spec.read.at == "before" else n - 1, :, :] for k, x in values.items()})
    read = [optimizer.read(z, at) for z in units]

    known = None
    if spec.separate_write_key:
        unit = s.replace(step=torch.ones_like(s.step))
        b_known = [-gain * x for x in optimizer.update(tuple(zero for _ in names), one, unit)]
        assert problem.write_key is not None
        known = (_stack(b_known, (N, H, T, n)), problem.write_key, problem.v)
    solve = curvature != 0
    v = None if spec.separate_write_key else problem.v * (gain / curvature if solve else 1.0)
    out = LinearRecurrence(
        A=torch.stack([_stack(row, (N, H, T, n)) for row in _common(A)]),
        b=_stack([x * (curvature if solve else gain) for x in b], (N, H, T, n)),
        c=_stack(c, (N, H, T, n)),
        read=_stack(read, (N, H, T)),
        x=problem.k, w=problem.k, v=v, known=known, solve=solve, read_before=spec.read.at == "before",
    )  # fmt: skip
    return _only_events(_fold_value_step(out, spec), problem.valid)


def _keep(problem: Problem, n: int) -> Tensor | None:
    """exp(log_decay) before the first micro-step, 1 before the others: [N, H, T, n, d1, 1]."""
    if problem.log_decay is None:
        return None
    keep = torch.exp(problem.log_decay)[:, :, :, None, :, None]
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


@lru_cache(maxsize=None)
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


def targets(spec) -> dict[str, str]:
    """The paths that can serve a declaration, fastest on long sequences first, each with the reason."""
    if spec.regressor.family == "kernel":
        return {"sdpa": "softmax attention is torch's scaled_dot_product_attention", "definition": "one query at a time"}
    if spec.regressor.family == "least_squares":
        solver = spec.optimizer.kind
        read = {"chunk": f"least squares: gated statistics chunk by chunk, {solver} at the read", "recurrent": f"least squares: token by token, {solver} at the read"}
        if solver == "rls":
            read = {"recurrent": "recursive least squares carries the inverse from token to token"}
        return {**read, "definition": "the normal equations solved densely at every token"}
    if not is_linear(spec):
        return {"definition": f"token by token through torch.func.grad: {why_nonlinear(spec)}"}
    per_value = per_value_signals(spec)
    reason = "linear in the state: one canonical recurrence, probed from the optimizer"
    recurrent = {"recurrent": f"{reason}, one event at a time", "definition": "token by token through torch.func.grad"}
    if per_value and not folds_value_step(spec):
        recurrent["recurrent"] += f"; {per_value} per value channel gives each column its own triangular system, so there is no chunk form"
        return recurrent
    return {"chunk": f"{reason}, matmuls inside chunks", **recurrent}


def per_value_signals(spec) -> list[str]:
    return [name for name, s in spec.signals().items() if s.per == "value"]


def why_nonlinear(spec) -> str:
    """The first reason for which a trained declaration is no linear recurrence."""
    if not spec.regressor.linear:
        return f"regressor {spec.regressor.kind!r} is not linear in its weights"
    if not spec.optimizer.linear:
        return f"optimizer {spec.optimizer.kind!r} is not linear in (weights, gradient)"
    if not spec.objective.quadratic:
        return f"the gradient of objective {spec.objective.kind!r} is not affine in the prediction"
    return f"mini_batch={spec.mini_batch!r} takes gradients at frozen weights"


SHORT = 8  # tokens below which one event at a time beats setting up a chunk


def select_path(spec, *, path: str = "auto", length: int | None = None, device: str = "cpu") -> tuple[str, str]:
    """The path that runs a declaration, and why: (path, reason).

    Pure and never silent: an explicit `path` that cannot serve raises ValueError with the reason.
    """
    from .spec import spec as read_spec

    spec = read_spec(spec)
    possible = targets(spec)
    if path == "auto":
        if length is not None and length < SHORT and "recurrent" in possible:
            return "recurrent", f"{length} tokens: {possible['recurrent']}"
        return next(iter(possible.items()))
    if path in possible:
        return path, possible[path]
    best, why = next(iter(possible.items()))
    raise ValueError(f"path={path!r} cannot serve this declaration; choose from {['auto', *possible]} ({best}: {why})")
