"""The delta family and momentum: how they reduce to one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import delta as tr
from .checks import DK, DV, B, H, T, both, one_hot_keys, per_key, same, unit
from .hebbian import gla, linear_attention_unnormalised


def test_r01_gated_deltanet_without_decay_is_deltanet(qkv, step):
    both(
        tr.gated_deltanet(*qkv, step=step, log_decay=torch.zeros_like(step)),
        tr.deltanet(*qkv, step=step),
    )


def test_gated_deltanet_without_step_only_decays(qkv, step, log_decay, draw):
    state = draw(B, H, DK, DV)
    _, final = tr.gated_deltanet(*qkv, step=torch.zeros_like(step), log_decay=log_decay, state=state)
    same(final, log_decay.sum(1).exp()[..., None, None] * state)


def test_r02_kda_with_equal_channels_is_gated_deltanet(qkv, step, log_decay):
    both(
        tr.kda(*qkv, step=step, log_decay=per_key(log_decay)),
        tr.gated_deltanet(*qkv, step=step, log_decay=log_decay),
    )


def test_r03_kda_without_erase_is_gla(draw):
    """Keys that never meet again have nothing to erase; what is left is GLA with value β v."""
    k = one_hot_keys(DK)
    q, v = draw(B, DK, H, DK), draw(B, DK, H, DV)
    beta, g = draw(B, DK, H).sigmoid(), F.logsigmoid(draw(B, DK, H, DK))
    both(tr.kda(q, k, v, step=beta, log_decay=g), gla(q, k, beta[..., None] * v, log_decay=g))


def test_r07_rwkv7_reduces_to_deltanet(qkv, step):
    q, k, v = qkv
    no_decay = torch.zeros(B, T, H, DK, dtype=torch.float64)
    rwkv7 = tr.rwkv7(q, k, step[..., None] * v, write_key=k, step=per_key(step), log_decay=no_decay)
    both(rwkv7, tr.deltanet(q, k, v, step=step, scale=1.0))


def test_rwkv7_without_erase_is_gla(qkv, draw):
    q, k, v = qkv
    g, write_key = F.logsigmoid(draw(B, T, H, DK)), draw(B, T, H, DK)
    rwkv7 = tr.rwkv7(q, k, v, write_key=write_key, step=torch.zeros_like(g), log_decay=g)
    both(rwkv7, gla(q, write_key, v, log_decay=g, scale=1.0))


def test_r08_dplr_is_gla_kda_and_rwkv7(qkv, step, draw):
    q, k, v = qkv
    g, zero = F.logsigmoid(draw(B, T, H, DK)), torch.zeros(B, T, H, DK, dtype=torch.float64)
    both(tr.dplr(q, k, v, left=k, right=zero, log_decay=g), gla(q, k, v, log_decay=g, scale=1.0))
    beta = step[..., None]
    as_kda = tr.dplr(q, k, beta * v, left=-g.exp() * k, right=beta * k, log_decay=g)
    both(as_kda, tr.kda(q, k, v, step=step, log_decay=g, scale=1.0))
    a, write_key = draw(B, T, H, DK).sigmoid(), draw(B, T, H, DK)
    as_rwkv7 = tr.dplr(q, write_key, v, left=-k, right=a * k, log_decay=g)
    both(as_rwkv7, tr.rwkv7(q, k, v, write_key=write_key, step=a, log_decay=g))


def test_r09_one_micro_step_is_gated_deltanet(qkv, step, log_decay):
    q, k, v = qkv
    product = tr.gated_deltaproduct(q, k[:, :, None], v[:, :, None], step=step[:, :, None], log_decay=log_decay)
    both(product, tr.gated_deltanet(q, k, v, step=step, log_decay=log_decay))
    both(tr.deltaproduct(q, k[:, :, None], v[:, :, None], step=step[:, :, None]), tr.deltanet(q, k, v, step=step))


def test_r09_two_micro_steps_are_a_sequence_twice_as_long(draw, log_decay):
    q, k, v = draw(B, T, H, DK), unit(draw(B, T, 2, H, DK)), draw(B, T, 2, H, DV)
    beta = 2 * draw(B, T, 2, H).sigmoid()
    gates = torch.stack([log_decay, torch.zeros_like(log_decay)], 2)
    long = tr.gated_deltanet(
        torch.stack([q, q], 2).flatten(1, 2),
        k.flatten(1, 2),
        v.flatten(1, 2),
        step=beta.flatten(1, 2),
        log_decay=gates.flatten(1, 2),
    )
    both(tr.gated_deltaproduct(q, k, v, step=beta, log_decay=log_decay), (long[0][:, 1::2], long[1]))


def test_r10_repeating_a_pair_is_one_larger_step(qkv, step):
    q, k, v = qkv
    n = 3
    k_n, v_n = (x[:, :, None].expand(-1, -1, n, -1, -1) for x in (k, v))
    repeated = tr.deltaproduct(q, k_n, v_n, step=step[:, :, None].expand(-1, -1, n, -1))
    both(repeated, tr.deltanet(q, k, v, step=1 - (1 - step) ** n))


def test_r11_longhorn_is_deltanet_and_solves_its_problem(draw):
    q, k, v = draw(B, T, H, DK), draw(B, T, H, DK), draw(B, T, H, DV)
    beta = draw(B, T, H).exp()
    rate = beta / (1 + beta * k.square().sum(-1))
    both(tr.longhorn(q, k, v, step=beta), tr.deltanet(q, k, v, step=rate, scale=1.0))
    per_value, initial = draw(B, T, H, DV).exp(), draw(B, H, DK, DV)
    state = initial
    for t in range(T):
        now = slice(t, t + 1)
        _, after = tr.longhorn(q[:, now], k[:, now], v[:, now], step=per_value[:, now], state=state)
        error = torch.einsum("bhkv,bhk->bhv", after, k[:, t]) - v[:, t]
        stationary = after - state + k[:, t, :, :, None] * (per_value[:, t] * error)[..., None, :]
        assert stationary.abs().max() < 1e-9
        state = after
    same(state, tr.longhorn(q, k, v, step=per_value, state=initial)[1])


def test_r12_unbounded_steps_store_the_pair_exactly(draw):
    q, k, v = draw(B, T, H, DK), draw(B, T, H, DK), draw(B, T, H, DV)
    nlms = tr.deltanet(k, k, v, step=1 / k.square().sum(-1), scale=1.0)
    same(nlms[0], v)
    implicit = tr.longhorn(q, k, v, step=torch.full((B, T, H), 1e14, dtype=torch.float64))
    same(implicit[1], nlms[1])


def test_r13_orthonormal_keys_make_deltanet_linear_attention(draw):
    k = one_hot_keys(DK)
    q, v, one = draw(B, DK, H, DK), draw(B, DK, H, DV), torch.ones(B, DK, H, dtype=torch.float64)
    both(tr.deltanet(q, k, v, step=one), linear_attention_unnormalised(q, k, v))
    same(tr.deltanet(k, k, v, step=one, scale=1.0)[0], v)


def test_a_step_of_two_reflects(qkv, step, draw):
    """β = 2 on unit keys: S ← S (I − 2kkᵀ) keeps every norm."""
    q, k, v = qkv
    state = draw(B, H, DK, DV)
    _, final = tr.deltanet(q, k, torch.zeros_like(v), step=torch.full_like(step, 2.0), state=state)
    same(final.norm(dim=-2), state.norm(dim=-2))


def test_r24_without_momentum_is_gated_deltanet_reparametrised(qkv, step, log_decay):
    """Coupled decay (α, θ, v) is decay-first with β = θ/α and value α v."""
    q, k, v = qkv
    alpha = log_decay.exp()
    output, state = tr.momentum_deltanet(q, k, v, step=step * alpha, momentum=torch.zeros_like(step), log_decay=log_decay)
    both((output, state["W"]), tr.gated_deltanet(q, k, alpha[..., None] * v, step=step, log_decay=log_decay))


def test_r25_r27_without_momentum_and_decay_is_deltanet(qkv, step):
    output, state = tr.momentum_deltanet(*qkv, step=step, momentum=torch.zeros_like(step))
    both((output, state["W"]), tr.deltanet(*qkv, step=step))


def test_r26_momentum_is_linear_in_the_augmented_state(qkv, step, log_decay, draw):
    """[S, M]_t = [S, M]_{t-1} 𝒜_t + ℬ_t."""
    q, k, v = qkv
    eta, theta, alpha = draw(B, T, H).sigmoid(), step, log_decay.exp()
    eye = torch.eye(DK, dtype=torch.float64)
    augmented, outputs = torch.zeros(B, H, DV, 2 * DK, dtype=torch.float64), []
    for t in range(T):
        a, e, s = (x[:, t, :, None, None] for x in (alpha, eta, theta))
        kk, vk = k[:, t, :, :, None] * k[:, t, :, None], v[:, t, :, :, None] * k[:, t, :, None]
        transition = torch.cat(
            [torch.cat([a * eye - s * kk, -s * kk], -1), torch.cat([e * eye, e * eye], -1)],
            -2,
        )
        augmented = augmented @ transition + torch.cat([s * vk, s * vk], -1)
        outputs.append(torch.einsum("bhvk,bhk->bhv", augmented[..., :DK], q[:, t]) * DK**-0.5)
    output, state = tr.momentum_deltanet(q, k, v, step=theta, momentum=eta, log_decay=log_decay)
    same(output, torch.stack(outputs, 1))
    same(state["W"], augmented[..., :DK].mT)
    same(state["momentum"], augmented[..., DK:].mT)
