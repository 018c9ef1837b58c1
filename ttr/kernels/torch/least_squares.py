"""The paths of the least-squares regressor: `definition`, `recurrent` (decoding) and `chunk` (training, prefill)."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...least_squares import (
    Events,
    Statistics,
    carries_inverse,
    definition,
    initial_state,
    least_scale,
    ridge_decays,
    ridge_now,
    symmetric,
    token_by_token,
)
from ...regressors import LeastSquares
from ...spec import Spec
from ...state import State
from ..problem import Problem
from .implicit_solve import conjugate_gradients, implicit_solve
from .pairs import ChannelGram, Decays, ScalarGram, gated_read

__all__ = ["chunk", "definition", "initial_state", "recurrent"]


def chunk(problem: Problem, chunk_size: int = 64) -> tuple[Tensor, State]:
    """All tokens at once: statistics at the chunks' starts, one solve for every read, two gated products.

    (H_t + Lambda_t) x_t = q_t,  o_t = G_t^T x_t, with H_t p and G_t^T x from the chunk's pairs. `cg` never forms H_t; the exact
    solvers form those of one chunk at a time, without a gate only the one before each chunk. Memory is linear in T: the
    statistics of T / chunk_size chunk starts and chunk_size numbers a token. chunk_size: rounded up to a power of two; it never
    changes a result.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    spec, events = problem.spec, Events.of(problem)
    T = events.q.shape[2]
    C = 1 << (min(chunk_size, T) - 1).bit_length()
    n_chunks = -(-T // C)

    def tiles(x: Tensor) -> Tensor:  # zeros behind the end: no weight, no decay
        return F.pad(x, (0, 0, 0, n_chunks * C - T)).unflatten(2, (n_chunks, C))

    q, k, v, weight, log_decay = (tiles(x) for x in (events.q, events.k, events.v, events.weight, events.log_decay))
    before = spec.read.at == "before"
    decays = Decays.of(log_decay, before)
    roots = Decays.of(log_decay / 2, before) if log_decay.shape[-1] > 1 else None
    starts, last = _between_chunks(Statistics.of(problem.state), k, v, weight, decays, roots)

    scale = decays.start * starts.scale[..., None, :]  # [N, H, chunks, C, dk]
    ridge = ridge_now(spec, events.ridge[None, :, None, None], scale)
    form = ScalarGram() if roots is None else ChannelGram(before)
    theta = form.theta(k, weight, roots or decays, starts.H, ridge)
    x = implicit_solve(q, form.product, _solver(spec, form, q.device), theta)
    o = gated_read(x, k, weight * v, decays, starts.G)
    return o.flatten(2, 3)[:, :, :T], last.state(spec, events.ridge)


def _between_chunks(
    start: Statistics, k: Tensor, v: Tensor, weight: Tensor, decays: Decays, roots: Decays | None
) -> tuple[Statistics, Statistics]:
    """The statistics before each chunk [N, H, chunks, ..], and the last ones. roots: per-key decays, halved in the log."""
    add_G = (decays.end * weight * k).mT @ v
    if roots is None:
        add_H, keep_H = (decays.end * weight * k).mT @ k, decays.total[..., None]
    else:
        decayed = roots.end * k
        add_H, keep_H = (weight * decayed).mT @ decayed, roots.total[..., :, None] * roots.total[..., None, :]
    keep, G, H, scale = decays.total, start.G, start.H, start.scale
    states = []
    for c in range(k.shape[2]):
        states.append((G, H, scale))
        G = keep[:, :, c, :, None] * G + add_G[:, :, c]
        H = keep_H[:, :, c] * H + add_H[:, :, c]
        scale = keep[:, :, c] * scale
    before_each = (torch.stack(x, 2) for x in zip(*states, strict=True))
    return Statistics(*before_each), Statistics(G, H, scale)


def _solver(spec: Spec, form: ScalarGram | ChannelGram, device: torch.device):
    """(q [N, H, chunks, C, dk], *theta) -> x."""
    optimizer = spec.optimizer

    def iterate(q: Tensor, *theta: Tensor) -> Tensor:
        return conjugate_gradients(lambda p: form.product(p, *theta), q, optimizer.iterations, optimizer.tolerance)

    def exact(q: Tensor, *theta: Tensor) -> Tensor:
        chunks = range(q.shape[2])
        return torch.stack([_solve(spec, form.dense(*(x[:, :, c] for x in theta)), q[:, :, c]) for c in chunks], 2)

    if optimizer.kind == "cg":
        return iterate
    rooted = not spec.gate.decays and cast(LeastSquares, spec.regressor).never_negative and device.type != "mps"  # which has no float64
    return partial(_without_gate, spec.read.at == "before") if rooted else exact


def _without_gate(before: bool, q: Tensor, *theta: Tensor) -> Tensor:
    """One inverse a chunk. M_t differs from M_0 by the pairs up to t, so by Woodbury's identity, with B the rows sqrt(w_s) k_s,

        x_t = P q_t - P B_t^T (I + B_t P B_t^T)^-1 B_t P q_t,     P = M_0^-1

    and as B_t are the first rows of B, I + B_t P B_t^T has the first rows of one Cholesky factor L of all: L^-1 B P q without the
    rows behind t, then L^-T. Under a small ridge P is large and much of it cancels in x, so all is in float64, and what is left of
    q is solved for once more.
    """
    theta = tuple(x.double() for x in theta)
    H, _, pairs, k, ridge = theta
    P = symmetric(torch.linalg.inv_ex(H + torch.diag_embed(ridge[..., 0, :].expand(H.shape[:-1])))[0])
    B = pairs[..., -1, :, None].sqrt() * k  # the last row has all weights; one that it lacks, nobody reads
    BP = B @ P
    L = torch.linalg.cholesky_ex(torch.eye(k.shape[-2], dtype=P.dtype, device=P.device) + BP @ B.mT)[0]

    def solved(q: Tensor) -> Tensor:
        x = q @ P
        y = torch.linalg.solve_triangular(L, B @ x.mT, upper=False).triu(1 if before else 0)  # rows s, columns t
        return x - torch.linalg.solve_triangular(L.mT, y, upper=True).mT @ BP

    x = solved(q.double())
    return (x + solved(q.double() - ScalarGram.product(x, *theta))).to(q.dtype)


def _solve(spec: Spec, M: Tensor, q: Tensor) -> Tensor:
    """M [.., dk, dk] positive definite, q [.., dk]. A ridge that has decayed may leave M so only up to rounding: LU."""
    if ridge_decays(spec) or carries_inverse(spec):
        return torch.linalg.solve_ex(M, q[..., None])[0][..., 0]
    return torch.cholesky_solve(q[..., None], torch.linalg.cholesky(M))[..., 0]


def recurrent(problem: Problem) -> tuple[Tensor, State]:
    """Token by token, the state between two tokens of constant size: what decoding runs."""
    spec = problem.spec
    if carries_inverse(spec):
        return _recursive(problem)

    def product(p: Tensor, H: Tensor, ridge: Tensor) -> Tensor:
        return (H @ p[..., None])[..., 0] + ridge * p

    def solver(q: Tensor, H: Tensor, ridge: Tensor) -> Tensor:
        if spec.optimizer.kind == "cg":
            steps, tolerance = spec.optimizer.iterations, spec.optimizer.tolerance
            return conjugate_gradients(lambda p: product(p, H, ridge), q, steps, tolerance)
        return _solve(spec, H + torch.diag_embed(ridge), q)

    return token_by_token(problem, lambda H, ridge, q: implicit_solve(q, product, solver, (H, ridge)))


def _recursive(problem: Problem) -> tuple[Tensor, State]:
    """Recursive least squares with forgetting, the inverse P carried by Sherman and Morrison's formula.

    P- = P / a,  g = w P- k / (1 + w k^T P- k),  W = W + g (v - W^T k)^T,  P = P- - g (P- k)^T,  o = W^T q.

    Forgetting without excitation makes P grow: it is held where float arithmetic loses M = P^{-1} beside 1 (least_scale),
    and a token that keeps less than that of the past starts anew. Sources: Haykin, Adaptive Filter Theory; 2309.05858.
    """
    spec, events = problem.spec, Events.of(problem)
    least = least_scale(events.q.dtype)
    W, P = problem.state.weights["W"], symmetric(problem.state.weights["P"])
    ridge = events.ridge.detach()
    blank = torch.diag_embed(1 / (least * ridge))
    outputs = []
    for t in range(events.q.shape[2]):
        q, k, v, weight = (x[:, :, t] for x in (events.q, events.k, events.v, events.weight))
        if spec.read.at == "before":
            outputs.append((q[..., None, :] @ W)[..., 0, :])
        if spec.gate.decays:
            keep = events.log_decay[:, :, t, :, None].exp()  # [N, H, 1, 1]
            held = least * (P.detach().diagonal(dim1=-2, dim2=-1) * ridge).amax(-1)[..., None, None]
            forget = keep < least
            W = torch.where(forget, 0, W)
            P = torch.where(forget, blank, P / torch.maximum(keep, held))
        direction = (P @ k[..., None])[..., 0]
        gain = weight * direction / (1 + weight * (k * direction).sum(-1, keepdim=True).clamp(min=0))
        error = v - (k[..., None, :] @ W)[..., 0, :]
        W = W + gain[..., :, None] * error[..., None, :]
        P = symmetric(P - gain[..., :, None] * direction[..., None, :])
        if spec.read.at == "after":
            outputs.append((q[..., None, :] @ W)[..., 0, :])
    return torch.stack(outputs, 2), State(weights={"W": W, "P": P}, spec_hash=problem.state.spec_hash)
