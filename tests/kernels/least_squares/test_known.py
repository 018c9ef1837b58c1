"""The definition of least squares against what is known of it: ridge regression, the delta rule, linear attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ttr
from ttr.kernels.problem import Problem
from ttr.kernels.torch import least_squares

from .problems import DK, DV, SPECS, H, N, close, make, ridge


def gram(problem: Problem):
    """G, H over all pairs of a problem with a scalar gate or none: c_i = w_i prod_{j>i} a_j."""
    weight, k, v = problem.signals["weight"][..., 0, 0], problem.k[..., 0, :], problem.v[..., 0, :]
    log_decay = torch.zeros_like(weight) if problem.log_decay is None else problem.log_decay
    c = weight * (log_decay.sum(2, keepdim=True) - log_decay.cumsum(2)).exp()
    return (c * k).mT @ v, (c * k).mT @ k, log_decay.sum(2).exp()


def last_read(G, M, q):
    return (torch.linalg.solve(M, q[:, :, -1, :, None]).mT @ G)[..., 0, :]


@pytest.mark.parametrize("name", ["rls-none-constant-after", "cholesky-none-constant-after", "cg-none-constant-after"])
def test_r14_without_forgetting_all_solvers_are_ridge_regression(name):
    problem = make(SPECS[name], 33, started=False)
    G, gram_matrix, _ = gram(problem)
    M = gram_matrix + torch.diag_embed(ridge(problem))
    for run in (least_squares.recurrent, least_squares.chunk):
        o, state = run(problem)
        close(o[:, :, -1], last_read(G, M, problem.q))
        if "P" in state.weights:
            close(state.weights["W"], torch.linalg.solve(M, G))
            close(state.weights["P"], torch.linalg.inv(M))
        else:
            close(state.weights["G"], G)
            close(state.weights["H"], gram_matrix)


@pytest.mark.parametrize("name", ["rls-scalar-decaying-after", "cg-scalar-decaying-after", "cholesky-scalar-constant-after"])
def test_r15_a_ridge_decays_or_stays(name):
    problem = make(SPECS[name], 33, started=False)
    G, gram_matrix, kept = gram(problem)
    decayed, constant = (gram_matrix + torch.diag_embed(x * ridge(problem)) for x in (kept, 1.0))
    right, wrong = (decayed, constant) if "decaying" in name else (constant, decayed)
    for run in (least_squares.recurrent, least_squares.chunk):
        close(run(problem)[0][:, :, -1], last_read(G, right, problem.q))
    assert (last_read(G, right, problem.q) - last_read(G, wrong, problem.q)).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_r16_as_many_cg_steps_as_channels_solve(gate):
    spec = ttr.spec(SPECS[f"cg-{gate}-constant-after"], **{"optimizer.iterations": DK})
    exact = make(SPECS[f"cholesky-{gate}-constant-after"], 65)
    for run in (least_squares.definition, least_squares.chunk):
        close(run(replace(exact, spec=spec))[0], least_squares.definition(exact)[0], 1e-6)


def test_r17_one_cg_step_is_scaled_gated_linear_attention():
    spec = ttr.spec(SPECS["cg-scalar-constant-after"], **{"optimizer.iterations": 1})
    problem = make(spec, 20, started=False)
    G, gram_matrix, _ = gram(problem)
    q = problem.q[:, :, -1]
    gain = (q * q).sum(-1) / torch.einsum("nhk,nhkl,nhl->nh", q, gram_matrix + torch.diag_embed(ridge(problem)), q)
    close(least_squares.chunk(problem)[0][:, :, -1], gain[..., None] * (q[..., None, :] @ G)[..., 0, :])


def test_r18_a_large_ridge_is_gated_linear_attention():
    problem = make(SPECS["cg-vector-constant-after"], 20, started=False)
    problem = replace(problem, params={"ridge": torch.full((H, DK), 1e11, dtype=torch.float64)})
    keep, written = problem.log_decay.exp(), problem.signals["weight"][..., 0, 0] * problem.k[..., 0, :]
    G, outputs = torch.zeros(N, H, DK, DV, dtype=torch.float64), []
    for t in range(20):
        G = keep[:, :, t, :, None] * G + written[:, :, t, :, None] * problem.v[:, :, t]
        outputs.append((problem.q[:, :, t, None] @ G)[..., 0, :])
    close(1e11 * least_squares.chunk(problem)[0], torch.stack(outputs, 2))


def test_r19_rls_is_the_preconditioned_delta_rule():
    """W <- W - w P k (k^T W - v^T), P the inverse of H and its decaying ridge."""
    problem = make(SPECS["rls-scalar-decaying-after"], 20, started=False)
    M = torch.diag_embed(ridge(problem)).expand(N, -1, -1, -1)
    W = torch.zeros(N, H, DK, DV, dtype=torch.float64)
    for t in range(20):
        k, weight = problem.k[:, :, t], problem.signals["weight"][:, :, t, 0]
        M = problem.log_decay[:, :, t, :, None].exp() * M + weight * k.mT @ k
        W = W - weight * torch.linalg.solve(M, k.mT) @ (k @ W - problem.v[:, :, t])
    close(least_squares.recurrent(problem)[1].weights["W"], W)


def test_r20_richardson_on_the_read_is_gradient_descent_on_the_objective():
    """n steps x <- x + r (q - M x) read what n gradient steps from 0 on the ridge objective have learnt; both end here."""
    problem = make(SPECS["cg-scalar-constant-after"], 20, started=False)
    G, gram_matrix, _ = gram(problem)
    M, q = gram_matrix + torch.diag_embed(ridge(problem)), problem.q[:, :, -1, :, None]
    rate = 1 / torch.linalg.matrix_norm(M, 2).max()
    x, W = torch.zeros_like(q), torch.zeros_like(G)
    for _ in range(7):
        x, W = x + rate * (q - M @ x), W - rate * (M @ W - G)
    close(G.mT @ x, W.mT @ q)
    for _ in range(2000):
        W = W - rate * (M @ W - G)
    close(least_squares.chunk(problem)[0][:, :, -1, :, None], W.mT @ q)


def test_r21_orthonormal_keys_make_mesa_scaled_linear_attention():
    spec = {"regressor": {"kind": "least_squares", "weight": 1.0, "ridge_floor": 0.0}, "optimizer": "rls"}
    problem = make(spec, DK, started=False)
    one_hot = torch.eye(DK, dtype=torch.float64)[None, None, :, None].expand(N, H, DK, 1, DK)
    ones, raw = torch.ones(N, H, DK, 1, 1, 1, dtype=torch.float64), torch.full((H, DK), 0.4, dtype=torch.float64)
    state = least_squares.initial_state(problem.spec, {"ridge": raw}, N, H, DK, DV, torch.float64, "cpu")
    problem = replace(problem, k=one_hot, signals={"weight": ones}, params={"ridge": raw}, state=state)
    linear = (problem.q @ problem.k[..., 0, :].mT).tril() @ problem.v[..., 0, :]
    for run in (least_squares.definition, least_squares.recurrent, least_squares.chunk):
        close(run(problem)[0], linear / (1 + F.softplus(raw[0, 0])))


# The solver and its derivative
