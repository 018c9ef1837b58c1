"""RLS, Mesa and MesaNet against ridge regression and against linear attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import least_squares as tr
from .checks import DK, DV, B, H, T, one_hot_keys, same
from .hebbian import linear_attention_unnormalised, mamba2


def gram(k: Tensor, v: Tensor, weight: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """G and H over all pairs, c_i = β_i ∏_{j>i} γ_j: [B, H, dk, dv], [B, H, dk, dk]."""
    later = log_decay.sum(1, keepdim=True) - log_decay.cumsum(1)
    c = weight * later.exp()
    return torch.einsum("bth,bthk,bthv->bhkv", c, k, v), torch.einsum("bth,bthk,bthl->bhkl", c, k, k)


@pytest.fixture
def ridge(draw) -> Tensor:
    return 0.25 + draw(H, DK).exp()


def test_r14_rls_mesa_and_mesanet_are_ridge_regression(qkv, step, ridge):
    q, k, v = qkv
    one, zero = torch.ones_like(step), torch.zeros_like(step)
    G, gram_matrix = gram(k, v, step, zero)
    W = torch.linalg.solve(gram_matrix + torch.diag_embed(ridge), G)
    output, state = tr.rls(q, k, v, ridge=ridge, weight=step)
    same(state["W"], W)
    same(output[:, -1], torch.einsum("bhkv,bhk->bhv", W, q[:, -1]))
    same(tr.mesanet(q, k, v, weight=step, log_decay=zero, ridge=ridge)[0], output)
    mesa, state = tr.mesa(q, k, v, ridge=ridge)
    same(mesa, tr.rls(q, k, v, ridge=ridge)[0])
    same(mesa, tr.mesanet(q, k, v, weight=one, log_decay=zero, ridge=ridge)[0])
    G, gram_matrix = gram(k, v, one, zero)
    same(state["G"], G)
    same(state["R"], torch.linalg.inv(gram_matrix + torch.diag_embed(ridge)))


def test_r15_forgetting_decays_the_ridge_of_rls_and_not_of_mesanet(qkv, step, log_decay, ridge):
    q, k, v = qkv
    G, gram_matrix = gram(k, v, step, log_decay)
    decayed = torch.diag_embed(log_decay.sum(1).exp()[..., None] * ridge)
    output, state = tr.rls(q, k, v, ridge=ridge, weight=step, log_decay=log_decay)
    same(state["W"], torch.linalg.solve(gram_matrix + decayed, G))
    constant, state = tr.mesanet(q, k, v, weight=step, log_decay=log_decay, ridge=ridge)
    same(state["G"], G)
    same(state["H"], gram_matrix)
    solution = torch.linalg.solve(gram_matrix + torch.diag_embed(ridge), q[:, -1])
    same(constant[:, -1], torch.einsum("bhkv,bhk->bhv", G, solution))
    assert (constant - output).abs().max() > 1e-2


def conjugate_gradients(A: Tensor, b: Tensor, iterations: int) -> Tensor:
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(iterations):
        y = (A @ p[..., None])[..., 0]
        rr = (r * r).sum(-1, keepdim=True)
        a = rr / (p * y).sum(-1, keepdim=True)
        x, r = x + a * p, r - a * y
        p = r + (r * r).sum(-1, keepdim=True) / rr * p
    return x


def test_r16_as_many_cg_steps_as_channels_solve(qkv, step, log_decay, ridge):
    q, k, v = qkv
    G, gram_matrix = gram(k, v, step, log_decay)
    solution = conjugate_gradients(gram_matrix + torch.diag_embed(ridge), q[:, -1], DK)
    output, _ = tr.mesanet(q, k, v, weight=step, log_decay=log_decay, ridge=ridge)
    same(torch.einsum("bhkv,bhk->bhv", G, solution), output[:, -1], 1e-6)


def test_r17_one_cg_step_is_scaled_gated_linear_attention(qkv, step, log_decay, ridge):
    q, k, v = qkv
    G, gram_matrix = gram(k, v, step, log_decay)
    A, query = gram_matrix + torch.diag_embed(ridge), q[:, -1]
    gain = (query * query).sum(-1) / torch.einsum("bhk,bhkl,bhl->bh", query, A, query)
    linear, _ = mamba2(q, k, v, step=step, log_decay=log_decay)
    one_step = torch.einsum("bhkv,bhk->bhv", G, conjugate_gradients(A, query, 1))
    same(one_step, gain[..., None] * linear[:, -1])


def test_r18_a_large_ridge_is_gated_linear_attention(qkv, step, log_decay):
    q, k, v = qkv
    large = torch.full((H, DK), 1e11, dtype=torch.float64)
    output, _ = tr.mesanet(q, k, v, weight=step, log_decay=log_decay, ridge=large)
    same(1e11 * output, mamba2(q, k, v, step=step, log_decay=log_decay)[0])


def test_r19_rls_is_the_preconditioned_delta_rule(qkv, step, log_decay, ridge):
    """S_t = S_{t-1} − β_t (S_{t-1} k_t − v_t) k_tᵀ P_t, with P_t the inverse of H_t and its decaying ridge."""
    q, k, v = qkv
    S = torch.zeros(B, H, DV, DK, dtype=torch.float64)
    for t in range(T):
        past = slice(0, t + 1)
        _, H_t = gram(k[:, past], v[:, past], step[:, past], log_decay[:, past])
        P = torch.linalg.inv(H_t + torch.diag_embed(log_decay[:, past].sum(1).exp()[..., None] * ridge))
        error = torch.einsum("bhvk,bhk->bhv", S, k[:, t]) - v[:, t]
        direction = torch.einsum("bhk,bhkl->bhl", k[:, t], P)
        S = S - step[:, t, :, None, None] * error[..., None] * direction[..., None, :]
    same(tr.rls(q, k, v, ridge=ridge, weight=step, log_decay=log_decay)[1]["W"], S.mT)


def test_r20_richardson_is_batch_gradient_descent(qkv, step, log_decay, ridge):
    """n Richardson steps on (H + Λ) x = q read what n gradient steps from 0 on the ridge objective have learnt."""
    q, k, v = qkv
    G, gram_matrix = gram(k, v, step, log_decay)
    A, query, rate = gram_matrix + torch.diag_embed(ridge), q[:, -1], 0.05
    x, W = torch.zeros_like(query), torch.zeros_like(G)
    for _ in range(7):
        x = x + rate * (query - torch.einsum("bhkl,bhl->bhk", A, x))
        W = W - rate * (A @ W - G)
    same(torch.einsum("bhkv,bhk->bhv", G, x), torch.einsum("bhkv,bhk->bhv", W, query))


def test_r21_orthonormal_keys_make_mesa_scaled_linear_attention(draw):
    k, ridge = one_hot_keys(DK), torch.full((H, DK), 0.7, dtype=torch.float64)
    q, v = draw(B, DK, H, DK), draw(B, DK, H, DV)
    same(tr.mesa(q, k, v, ridge=ridge)[0], linear_attention_unnormalised(q, k, v, scale=1.0)[0] / 1.7)
