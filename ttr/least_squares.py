"""What least squares means: its statistics, its ridge, and THE DEFINITION, one token and one dense solve at a time.

    G_t = diag(a_t) G_{t-1} + w_t k_t v_t^T
    H_t = diag(a_t)^1/2 H_{t-1} diag(a_t)^1/2 + w_t k_t k_t^T
    o_t = G_t^T (H_t + Lambda_t)^{-1} q_t,      Lambda_t = Lambda, or s_t Lambda with s_t = a_t s_{t-1} if ridge_decays

    read: before  o_t is read from G_{t-1}, H_{t-1}, Lambda_{t-1}

The solver `cg` means that many conjugate-gradient steps from 0, no more; `cholesky` and `rls` mean the exact solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.problem import Problem
from .kernels.torch.implicit_solve import conjugate_gradients, implicit_solve
from .regressors import LeastSquares
from .spec import Spec
from .state import State

Solve = Callable[[Tensor, Tensor, Tensor], Tensor]  # H [.., dk, dk], ridge [.., dk], q [.., dk] -> x [.., dk]


def ridge_decays(spec: Spec) -> bool:
    return cast(LeastSquares, spec.regressor).ridge_decays


def ridge_of(spec: Spec, params: dict[str, Tensor], like: Tensor) -> Tensor:
    """Lambda, [H, dk], > 0."""
    raw = params["ridge"].to(device=like.device, dtype=like.dtype)
    return F.softplus(raw) + cast(LeastSquares, spec.regressor).ridge_floor


def least_scale(dtype: torch.dtype) -> float:
    """Where a decaying ridge stops. Below, the sum H + s Lambda could not hold it, and a dense solve would fail."""
    return 8 * torch.finfo(dtype).eps


def carries_inverse(spec: Spec) -> bool:
    """Whether the state is (W, P) = (M^{-1} G, M^{-1}), M = H + Lambda, instead of (G, H).

    A gate per key channel leaves no recursion for W (it becomes diag(a)^-1/2 P diag(a)^1/2 P^{-1} W), so rls under a
    vector gate carries the statistics and solves.
    """
    return spec.optimizer.kind == "rls" and not spec.gate.per_key


def carries_scale(spec: Spec) -> bool:
    """Whether the scale s of a ridge that decays is of the state; in an inverse it is within."""
    return ridge_decays(spec) and not carries_inverse(spec)


def initial_state(
    spec: Spec, params: dict[str, Tensor], n: int, n_heads: int, dk: int, dv: int, dtype: torch.dtype, device: torch.device | str | None
) -> State:
    """The memory of n sequences before their first token, of constant size.

    weights: G [n, H, dk, dv], H [n, H, dk, dk] and, if ridge_decays, ridge_scale s [n, H, dk]; for rls (but under a vector
    gate) W [n, H, dk, dv] and P [n, H, dk, dk], the inverse of H + Lambda.
    """
    zero = torch.zeros(n, n_heads, dk, dv, dtype=dtype, device=device)
    if carries_inverse(spec):
        P = torch.diag_embed(1 / ridge_of(spec, params, zero)).expand(n, -1, -1, -1)
        return State(weights={"W": zero, "P": P}, spec_hash=spec.hash)
    weights = {"G": zero, "H": zero.new_zeros(n, n_heads, dk, dk)}
    if carries_scale(spec):
        weights["ridge_scale"] = zero.new_ones(n, n_heads, dk)
    return State(weights=weights, spec_hash=spec.hash)


@dataclass(frozen=True)
class Events:
    """A problem as least squares sees it; tokens behind a sequence's end have weight 0 and log decay 0.

    q, k: [N, H, T, dk]; v: [N, H, T, dv]; weight: [N, H, T, 1]; log_decay: [N, H, T, d1]; ridge: [H, dk].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    log_decay: Tensor
    ridge: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Events:
        q, weight, log_decay = problem.q, problem.signals["weight"][..., 0, 0], problem.log_decay
        log_decay = torch.zeros_like(weight) if log_decay is None else log_decay
        if problem.valid is not None:
            real = problem.valid[:, None, :, None]
            weight, log_decay = torch.where(real, weight, 0), torch.where(real, log_decay, 0)
        ridge = ridge_of(problem.spec, problem.params, q)
        return cls(q, problem.k[..., 0, :], problem.v[..., 0, :], weight, log_decay, ridge)


@dataclass(frozen=True)
class Statistics:
    """G [N, H, dk, dv], H [N, H, dk, dk] and the ridge's scale [N, H, dk], between two tokens.

    Of a state (W, P) the ridge is within H = P^{-1}.
    """

    G: Tensor
    H: Tensor
    scale: Tensor

    @classmethod
    def of(cls, state: State) -> Statistics:
        w = state.weights
        if "P" in w:
            with torch.autocast(w["P"].device.type, enabled=False):  # a memory is float32 and stays it
                H = symmetric(inverse(symmetric(w["P"])))
                return cls(H @ w["W"], H, torch.zeros_like(H[..., 0]))
        scale = w.get("ridge_scale")
        return cls(w["G"], symmetric(w["H"]), torch.ones_like(w["H"][..., 0]) if scale is None else scale)

    def state(self, spec: Spec, ridge: Tensor) -> State:
        """In the form that `initial_state` has. ridge: Lambda, [H, dk]."""
        if carries_inverse(spec):
            with torch.autocast(self.H.device.type, enabled=False):
                P = symmetric(inverse(self.H + torch.diag_embed(ridge_now(spec, ridge, self.scale))))
                weights = {"W": P @ self.G, "P": P}
        else:
            weights = {"G": self.G, "H": self.H}
            if carries_scale(spec):
                weights["ridge_scale"] = self.scale
        return State(weights=weights, spec_hash=spec.hash)


def symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def inverse(x: Tensor) -> Tensor:
    """Raises on a CPU where there is none; on a GPU the host would wait to know."""
    return torch.linalg.inv_ex(x, check_errors=x.device.type == "cpu")[0]


def ridge_now(spec: Spec, ridge: Tensor, scale: Tensor) -> Tensor:
    """Lambda_t [.., dk] from Lambda [.., dk] and its scale [.., dk]."""
    if carries_inverse(spec):
        return (ridge.detach() * least_scale(scale.dtype)).expand_as(scale)
    return ridge * scale.clamp(min=least_scale(scale.dtype)) if ridge_decays(spec) else ridge.expand_as(scale)


def token_by_token(problem: Problem, solve: Solve) -> tuple[Tensor, State]:
    """The equations above, literally, with the solver left open: (o [N, H, T, dv], state)."""
    spec, events = problem.spec, Events.of(problem)
    start = Statistics.of(problem.state)
    G, H, scale = start.G, start.H, start.scale
    outputs = []

    def read(q: Tensor) -> Tensor:
        x = solve(H, ridge_now(spec, events.ridge, scale), q)
        return (x[..., None, :] @ G)[..., 0, :]

    for t in range(events.q.shape[2]):
        if spec.read.at == "before":
            outputs.append(read(events.q[:, :, t]))
        k, v, weight = events.k[:, :, t], events.v[:, :, t], events.weight[:, :, t]
        keep, root = events.log_decay[:, :, t].exp(), (events.log_decay[:, :, t] / 2).exp()
        written = weight * k
        G = keep[..., None] * G + written[..., None] * v[..., None, :]
        H = root[..., :, None] * H * root[..., None, :] + written[..., :, None] * k[..., None, :]
        scale = keep * scale
        if spec.read.at == "after":
            outputs.append(read(events.q[:, :, t]))
    return torch.stack(outputs, 2), Statistics(G, H, scale).state(spec, events.ridge)


def definition(problem: Problem) -> tuple[Tensor, State]:
    """The definition: a dense solve at every token.

    For `cg` the dense solve is that many conjugate-gradient steps, and the gradient is the implicit one: x_bar is
    solved for by the same steps, (H + Lambda) q_bar = x_bar, and H_bar = -q_bar x^T, Lambda_bar = -q_bar * x.
    Otherwise torch differentiates torch.linalg.solve.
    """
    optimizer = problem.spec.optimizer

    def exact(H: Tensor, ridge: Tensor, q: Tensor) -> Tensor:
        return torch.linalg.solve(H + torch.diag_embed(ridge), q[..., None])[..., 0]

    def product(p: Tensor, M: Tensor) -> Tensor:
        return (M @ p[..., None])[..., 0]

    def iterate(H: Tensor, ridge: Tensor, q: Tensor) -> Tensor:
        def steps(q: Tensor, M: Tensor) -> Tensor:
            return conjugate_gradients(lambda p: product(p, M), q, optimizer.iterations, optimizer.tolerance)

        return implicit_solve(q, product, steps, (H + torch.diag_embed(ridge),))

    return token_by_token(problem, iterate if optimizer.kind == "cg" else exact)
