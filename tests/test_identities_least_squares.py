"""What least squares becomes in special cases, and what becomes least squares (R14-R21), in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from identities import DK, DV, LA, B, Draw, H, T, close, frozen_paths, linear_paths, ones, run, zeros
from torch import Tensor

import ttr


@pytest.fixture
def draw() -> Draw:
    return Draw()


def statistics(x: dict[str, Tensor], weight: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """G_t = a G + w k v^T, H_t = a H + w k k^T at every t: [B, T, H, dk, dv], [B, T, H, dk, dk]."""
    total = log_decay.cumsum(1)
    keep = torch.exp(total[:, :, None] - total[:, None]).masked_fill(torch.ones(T, T).triu(1).bool()[None, :, :, None], 0)
    G = torch.einsum("btsh,bsh,bshk,bshv->bthkv", keep, weight, x["k"], x["v"])
    return G, torch.einsum("btsh,bsh,bshk,bshl->bthkl", keep, weight, x["k"], x["k"])


def solved(x: dict[str, Tensor], G: Tensor, M: Tensor) -> Tensor:
    return torch.einsum("bthkv,bthk->bthv", G, torch.linalg.solve(M, x["q"]))


def ridge(value: Tensor | float, floor: float = 0.25) -> dict[str, Tensor]:
    """The learned constant whose ridge is `value`: softplus(l) + floor."""
    value = torch.as_tensor(value, dtype=torch.float64).expand(H, DK) - floor
    return {"ridge": value + torch.log(-torch.expm1(-value))}


def squares(solver: Any = "cholesky", gate: str = "none", **regressor: Any) -> ttr.Spec:
    return ttr.spec({"regressor": {"kind": "least_squares", **regressor}, "optimizer": solver, "gate": gate})


@linear_paths
def test_r14_recursive_least_squares_is_ridge_regression(draw, path):
    x, weight = draw.qkv(), draw.rate()
    per_channel = 0.3 + draw(H, DK).exp()
    G, M = statistics(x, weight, zeros())
    expected = solved(x, G, M + torch.diag_embed(per_channel))
    for solver in ("rls", "cholesky", {"kind": "cg", "iterations": 3 * DK}):
        close(run(squares(solver), path, **x, weight=weight, params=ridge(per_channel))[0], expected)
    mesanet = ttr.spec("mesanet", gate="none", optimizer="cholesky")
    mesa = run("mesa", path, **x, params=ridge(0.7, floor=0.0))
    close(run(mesanet, path, **x, weight=1.0, params=ridge(0.7))[0], mesa[0])


@linear_paths
def test_r15_forgetting_least_squares_forgets_its_ridge(draw, path):
    """Recursive least squares is ridge regression with a decaying ridge, and not MesaNet, whose ridge is constant."""
    x, weight, decay = draw.qkv(), draw.rate(), draw.log_decay()
    G, M = statistics(x, weight, decay)
    signals = {"weight": weight, "log_decay": decay, "params": ridge(1.0)}
    decaying = solved(x, G, M + decay.cumsum(1).exp()[..., None, None] * torch.eye(DK))
    constant = solved(x, G, M + torch.eye(DK))
    for solver in ("rls", "cholesky"):
        close(run(squares(solver, "scalar", ridge_decays=True), path, **x, **signals)[0], decaying)
    mesanet = ttr.spec("mesanet", optimizer="cholesky")
    close(run(mesanet, path, **x, **signals)[0], constant)
    assert (decaying - constant).abs().max() > 0.01 * constant.abs().max()


@linear_paths
def test_r16_enough_conjugate_gradients_are_the_direct_solution(draw, path):
    x = {**draw.qkv(), "weight": draw.rate(), "log_decay": draw.log_decay(), "params": ridge(0.5)}
    direct = run(ttr.spec("mesanet", optimizer="cholesky"), path, **x)[0]
    close(run(ttr.spec("mesanet", **{"optimizer.iterations": DK}), path, **x)[0], direct, 1e-6)
    close(run("mesanet", path, **x)[0], direct)


@linear_paths
def test_r17_one_conjugate_gradient_is_gated_linear_attention(draw, path):
    """o = (q^T q / q^T (H + Lambda) q) G^T q."""
    x, weight, decay = draw.qkv(), draw.rate(), draw.log_decay()
    G, M = statistics(x, weight, decay)
    q, M = x["q"], M + 0.5 * torch.eye(DK)
    gain = q.square().sum(-1) / torch.einsum("bthk,bthkl,bthl->bth", q, M, q)
    one = ttr.spec("mesanet", **{"optimizer.iterations": 1})
    got = run(one, path, **x, weight=weight, log_decay=decay, params=ridge(0.5))[0]
    close(got, gain[..., None] * torch.einsum("bthkv,bthk->bthv", G, q))
    close(got, gain[..., None] * run("mamba2", **x, step=weight, log_decay=decay)[0])


@linear_paths
def test_r18_a_large_ridge_leaves_gated_linear_attention(draw, path):
    x, weight, decay, large = draw.qkv(), draw.rate(), draw.log_decay(), 1e12
    got = run("mesanet", path, **x, weight=weight, log_decay=decay, params=ridge(large))[0]
    close(large * got, run("mamba2", **x, step=weight, log_decay=decay)[0])


@linear_paths
def test_r19_newton_preconditioned_delta_is_recursive_least_squares(draw, path):
    """W <- W - w P_t k (W^T k - v)^T, P_t = (H_t + Lambda)^-1."""
    x, weight = draw.qkv(), draw.rate()
    P = torch.linalg.inv(statistics(x, weight, zeros())[1] + 0.5 * torch.eye(DK))
    W, outputs = torch.zeros(B, H, DK, DV, dtype=torch.float64), []
    for t in range(T):
        k, v = x["k"][:, t], x["v"][:, t]
        error = torch.einsum("bhkv,bhk->bhv", W, k) - v
        W = W - weight[:, t, :, None, None] * torch.einsum("bhkl,bhl,bhv->bhkv", P[:, t], k, error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", W, x["q"][:, t]))
    close(run(squares("rls"), path, **x, weight=weight, params=ridge(0.5))[0], torch.stack(outputs, 1))


@frozen_paths
@pytest.mark.parametrize("passes", [1, 4])
def test_r20_richardson_is_batch_gradient_descent_on_the_ridge_objective(draw, path, passes):
    """k passes of delta over the sequence as one mini-batch, the ridge as decay, against k steps of x <- x + s (q - M x)."""
    x, rate, penalty = draw.qkv(), 0.05, 0.7
    spec = ttr.spec({"optimizer": {"kind": "delta", "mini_batch": T}, "gate": "scalar"})
    decay = zeros()
    decay[:, 0] = math.log(1 - rate * penalty)
    state = None
    for _ in range(passes):
        state = run(spec, path, **x, step=rate, log_decay=decay, initial_state=state)[1]
    G, M = (s[:, -1] for s in statistics(x, ones(), zeros()))
    q = draw(B, H, DK)
    y = torch.zeros_like(q)
    for _ in range(passes):
        y = y + rate * (q - torch.einsum("bhkl,bhl->bhk", M + penalty * torch.eye(DK), y))
    close(torch.einsum("bhkv,bhk->bhv", state.weights["W"], q), torch.einsum("bhkv,bhk->bhv", G, y))


@linear_paths
@pytest.mark.parametrize("solver", ["rls", "cholesky"])
def test_r21_orthonormal_keys_make_mesa_linear_attention(draw, path, solver):
    x = {"q": draw(B, DK, H, DK), "k": torch.linalg.qr(draw(B, H, DK, DK)).Q.transpose(1, 2), "v": draw(B, DK, H, DV)}
    close(run(squares(solver), path, **x, weight=1.0, params=ridge(0.7))[0], run(LA, **x)[0] / 1.7)
