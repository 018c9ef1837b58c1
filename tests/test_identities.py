"""Where one published system is a special case of another (R1-R13, R22-R31), through `ttr.regress` in float64."""

from __future__ import annotations

import math

import pytest
import torch
from identities import DK, DV, LA, TITANS, B, Draw, H, T, both, close, frozen_paths, linear_paths, ones, per_key, run, zeros

import ttr


@pytest.fixture
def draw() -> Draw:
    return Draw()


# Gated and additive systems


@linear_paths
def test_r01_without_forgetting_gated_deltanet_is_deltanet(draw, path):
    x = {**draw.qkv(), "step": draw.rate(), "initial_state": draw.state()}
    both(run("gated_deltanet", path, **x, log_decay=zeros()), run("deltanet", **x))


@linear_paths
def test_r02_kda_of_equal_channels_is_gated_deltanet(draw, path):
    x, decay = {**draw.qkv(), "step": draw.rate(), "initial_state": draw.state()}, draw.log_decay()
    both(run("kda", path, **x, log_decay=per_key(decay)), run("gated_deltanet", **x, log_decay=decay))


@linear_paths
def test_r03_kda_that_erases_nothing_is_gla(draw, path):
    x, decay = {**draw.qkv(), "initial_state": draw.state()}, draw.log_decay(DK)
    kda = ttr.spec("kda", **{"optimizer.write_key": "separate"})
    both(run(kda, path, **x, write_key=x["k"], step=zeros(), log_decay=decay), run("gla", **x, log_decay=decay))


@linear_paths
def test_r04_gla_of_equal_channels_is_mamba2(draw, path):
    x, decay, dt = draw.qkv(), draw.log_decay(), draw.rate()
    mamba2 = run("mamba2", **x, step=dt, log_decay=decay)
    both(run("gla", path, q=x["q"], k=x["k"], v=dt[..., None] * x["v"], log_decay=per_key(decay)), mamba2)


@linear_paths
def test_r05_without_forgetting_gla_and_mamba2_are_linear_attention(draw, path):
    x = {**draw.qkv(), "initial_state": draw.state()}
    both(run("gla", path, **x, log_decay=zeros(DK)), run(LA, **x))
    both(run("mamba2", path, **x, step=ones(), log_decay=zeros()), run(LA, **x))


@linear_paths
def test_r06_retnet_without_rotation_is_a_constant_gate(draw, path):
    x = draw.qkv()
    decay = (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).log()
    both(run("retnet", path, **x), run("mamba2", **x, step=1.0, log_decay=decay))


@linear_paths
def test_r07_rwkv7_with_one_key_is_deltanet(draw, path):
    x, step = draw.qkv(), draw.rate()
    rwkv7 = run("rwkv7", path, q=x["q"], k=x["k"], write_key=x["k"], v=step[..., None] * x["v"], step=per_key(step), log_decay=zeros(DK))
    both(rwkv7, run("deltanet", **x, step=step))


@linear_paths
def test_r08_diagonal_plus_low_rank_holds_gla_and_kda(draw, path):
    """S(Diag(w) + a b^T) + v k^T with a = -x, b = step x: b = 0 is GLA; a = -alpha k, b = beta k, v <- beta v is KDA."""
    x, decay, step = {**draw.qkv(), "initial_state": draw.state()}, draw.log_decay(DK), draw.rate()
    gla = run("rwkv7", path, **{**x, "k": draw(B, T, H, DK)}, write_key=x["k"], step=zeros(DK), log_decay=decay)
    both(gla, run("gla", **x, log_decay=decay))
    alpha = decay.exp()
    kda = run(
        "rwkv7", path, **{**x, "k": alpha * x["k"]}, write_key=step[..., None] * x["k"], step=step[..., None] / alpha, log_decay=decay
    )
    both(kda, run("kda", **x, step=step, log_decay=decay))


@linear_paths
def test_r09_micro_steps_are_tokens_of_a_longer_sequence(draw, path):
    q, k, v, step, decay = (
        draw(B, T, H, DK),
        draw.unit(B, T, 2, H, DK),
        draw(B, T, 2, H, DV),
        2 * draw(B, T, 2, H).sigmoid(),
        draw.log_decay(),
    )
    gates = torch.stack([decay, torch.zeros_like(decay)], 2)  # the gate acts before the first micro-step
    long = {"q": torch.stack([q, q], 2), "k": k, "v": v, "step": step, "log_decay": gates}
    o, state = run("gated_deltanet", **{name: x.flatten(1, 2) for name, x in long.items()})
    two = ttr.spec("gated_deltaproduct", **{"optimizer.steps": 2})
    both(run(two, path, q=q, k=k, v=v, step=step, log_decay=decay), (o[:, 1::2], state))
    one = ttr.spec("gated_deltaproduct", **{"optimizer.steps": 1})
    x = {**draw.qkv(), "step": draw.rate()}
    both(run(one, path, **x, log_decay=decay), run("gated_deltanet", **x, log_decay=decay))
    both(run(ttr.spec("deltaproduct", **{"optimizer.steps": 1}), path, **x), run("deltanet", **x))


@linear_paths
@pytest.mark.parametrize("n", [2, 5])
def test_r10_a_pair_repeated_is_one_larger_step(draw, path, n):
    x, step = draw.qkv(), draw.rate()
    repeated = ttr.spec("deltaproduct", **{"optimizer.steps": n, "optimizer.pairs": "shared"})
    both(run(repeated, path, **x, step=step), run("deltanet", **x, step=1 - (1 - step) ** n))


@linear_paths
def test_r11_longhorn_is_deltanet_with_a_bounded_step(draw, path):
    x, beta = {**draw.qkv(), "k": draw(B, T, H, DK), "initial_state": draw.state()}, draw(B, T, H).exp()
    longhorn = ttr.spec("longhorn", **{"optimizer.step.per": "head"})
    both(run(longhorn, path, **x, step=beta), run("deltanet", **x, step=beta / (1 + beta * x["k"].square().sum(-1))))


@pytest.mark.parametrize("path", ["definition", "recurrent"])
def test_r11_longhorn_solves_its_problem(draw, path):
    """(W_t - W_{t-1}) + k (beta (W_t^T k - v))^T = 0, beta per value channel."""
    x, beta, before = {**draw.qkv(1), "k": draw(B, 1, H, DK)}, draw(B, 1, H, DV).exp(), draw.state()
    after = run("longhorn", path, **x, step=beta, initial_state=before)[1].weights["W"]
    k, v = x["k"][:, 0], x["v"][:, 0]
    error = torch.einsum("bhkv,bhk->bhv", after, k) - v
    assert (after - before + k[..., None] * (beta[:, 0] * error)[..., None, :]).abs().max() < 1e-9


@linear_paths
def test_r12_unbounded_steps_store_the_pair(draw, path):
    """Kaczmarz: W_t^T k_t = v_t, by the implicit rule with a step without bound and by nlms with step 1."""
    x = {**draw.qkv(), "k": draw(B, T, H, DK)}
    implicit = run({"optimizer": "implicit"}, path, **{**x, "q": x["k"]}, step=1e14)
    nlms = run({"optimizer": {"kind": "nlms", "step_rule": {"eps": 1e-14}}}, path, **{**x, "q": x["k"]}, step=1.0)
    both(implicit, nlms)
    close(nlms[0], x["v"])


@linear_paths
def test_r13_orthonormal_keys_make_deltanet_linear_attention(draw, path):
    k = torch.linalg.qr(draw(B, H, DK, DK)).Q.transpose(1, 2)
    x = {"q": draw(B, DK, H, DK), "k": k, "v": draw(B, DK, H, DV)}
    both(run("deltanet", path, **x, step=1.0), run(LA, **x))


# Deep regressors, momentum, objectives


@pytest.mark.parametrize("path", ["definition", "auto"])
def test_r22_ttt_linear_stripped_is_deltanet(draw, path):
    x, step, W = draw.qkv(), draw.rate(), draw(H, DK, DV)
    bare = {"norm": "none", "residual": False, "bias": False}
    stripped = ttr.spec("ttt_linear", regressor=bare, objective="l2", **{"optimizer.mini_batch": 1, "optimizer.position": "none"})
    o, state = run(stripped, path, **x, step=step, params={"W1": W})
    expected, final = run("deltanet", **x, step=step, initial_state=W.expand(B, H, DK, DV))
    close(o, expected)
    close(state.weights["W1"], final.weights["W"])


@frozen_paths
@pytest.mark.parametrize("mini_batch", ["sequence", T])
def test_r23_one_batch_step_from_zero_is_linear_attention(draw, path, mini_batch):
    x = draw.qkv()
    both(run(ttr.spec("deltanet", **{"optimizer.mini_batch": mini_batch}), path, **x, step=1.0), run(LA, **x))


@linear_paths
def test_r24_titans_without_momentum_is_gated_deltanet_reparametrised(draw, path):
    """Coupled decay (alpha, theta, v) is decay-first with beta = theta / alpha and value alpha v."""
    x, step, decay = {**draw.qkv(), "initial_state": draw.state()}, draw.rate(), draw.log_decay()
    alpha = decay.exp()
    titans = run(TITANS, path, **x, step=step * alpha, momentum=0.0, log_decay=decay)
    both(titans, run("gated_deltanet", **{**x, "v": alpha[..., None] * x["v"]}, step=step, log_decay=decay))


@linear_paths
def test_r25_titans_without_momentum_and_decay_is_deltanet(draw, path):
    x = {**draw.qkv(), "step": draw.rate(), "initial_state": draw.state()}
    both(run(TITANS, path, **x, momentum=0.0, log_decay=0.0), run("deltanet", **x))


@linear_paths
@pytest.mark.parametrize("nesterov", [False, True])
def test_r26_momentum_is_linear_in_the_augmented_state(draw, path, nesterov):
    """[S, N]_t = [S, N]_{t-1} A_t + B_t with S = W^T; the gate decays S alone."""
    x, theta, eta, decay = draw.qkv(), draw.rate(), draw.rate(), draw.log_decay()
    eye = torch.eye(DK, dtype=torch.float64)
    Z, outputs = torch.zeros(B, H, DV, 2 * DK, dtype=torch.float64), []
    for t in range(T):
        a, e, s = (signal[:, t, :, None, None] for signal in (decay.exp(), eta, theta))
        k, v = x["k"][:, t], x["v"][:, t]
        kk, vk = k[..., :, None] * k[..., None, :], v[..., :, None] * k[..., None, :]
        carried = e * (eye - s * kk) if nesterov else e * eye
        A = torch.cat([torch.cat([a * eye - s * kk, -s * kk], -1), torch.cat([carried, carried], -1)], -2)
        Z = Z @ A + torch.cat([s * vk, s * vk], -1)
        outputs.append(torch.einsum("bhvk,bhk->bhv", Z[..., :DK], x["q"][:, t]))
    spec = ttr.spec(TITANS, **{"optimizer.nesterov": nesterov})
    o, state = run(spec, path, **x, step=theta, momentum=eta, log_decay=decay)
    close(o, torch.stack(outputs, 1))
    close(state.weights["W"], Z[..., :DK].mT)
    close(state.slots["momentum"]["W"], Z[..., DK:].mT)


@linear_paths
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_r27_without_momentum_it_is_sgd(draw, path, nesterov, objective):
    x = {**draw.qkv(), "step": draw.rate(), "initial_state": draw.state()}
    momentum = {"objective": objective, "optimizer": {"kind": "momentum", "nesterov": nesterov}}
    both(run(momentum, path, **x, momentum=0.0), run({"objective": objective, "optimizer": {"kind": "sgd", "step": "sigmoid"}}, **x))


@linear_paths
def test_r29_reading_before_the_update_is_strict_past_attention(draw, path):
    x = {**draw.qkv(), "initial_state": draw.state()}
    before, state = run(ttr.spec(LA, read="before"), path, **x)
    after, same = run(LA, **x)
    close(before, after - (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"])
    close(state.weights["W"], same.weights["W"])


QUADRATIC = {
    "huber of no threshold": {"objective": {"kind": "huber", "threshold": math.inf}},
    "huber of a signal": {"objective": {"kind": "huber", "threshold": "softplus"}},
    "huber of the length": {"objective": {"kind": "huber", "threshold": math.inf, "over": "length"}},
    "huber of a mixture": {"objective": {"kind": "huber", "threshold": math.inf, "over": "mixture"}},
    "lp of 2": {"objective": {"kind": "lp", "p": 2.0}},
}
SGD = {"optimizer": {"kind": "sgd", "step": "sigmoid"}}


@pytest.mark.parametrize("name", QUADRATIC)
def test_r30_robust_losses_become_l2(draw, name):
    """On a matrix and on an MLP, values and gradients."""
    for regressor in ("linear", {"kind": "mlp", "expansion": 1, "residual": False}):
        robust, plain = ({**SGD, "regressor": regressor, "gate": "scalar", **more} for more in (QUADRATIC[name], {"objective": "l2"}))
        leaves = {**draw.qkv(), "step": 0.5 * draw.rate(), "log_decay": draw.log_decay()}
        params = ttr.spec(plain).init_params(H, DK, DV, dtype=torch.float64)
        results = []
        for spec in (robust, plain):
            x = {n: t.clone().requires_grad_() for n, t in leaves.items()}
            more = {"threshold": torch.full((B, T, H), math.inf)} if name == "huber of a signal" and spec is robust else {}
            o, _ = run(spec, **x, **more, params=params)
            results.append([o, *torch.autograd.grad(o.square().sum(), list(x.values()))])
        for left, right in zip(*results, strict=True):
            close(left.detach(), right.detach())


@linear_paths
def test_r31_mlstm_that_forgets_nothing_is_linear_attention(draw, path):
    """With a constant input gate, and the denominator max(|n q|, 1) replaced by 1 or held there by small queries."""
    x, i = draw.qkv(), 0.3
    expected = i * run(LA, **x)[0]
    bare = ttr.spec("mlstm", **{"read.normalizer": "none"})
    close(run(bare, path, **x, step=i, log_decay=0.0)[0], expected)
    close(run("mlstm", path, **{**x, "q": 1e-3 * x["q"]}, step=i, log_decay=0.0)[0], 1e-3 * expected)


@pytest.mark.parametrize(("kind", "slot", "power"), [("muon", "momentum", 1), ("adam", "first_moment", 1), ("adam", "second_moment", 2)])
def test_a_weight_multiplies_the_gradient_of_a_step_at_every_token(kind, slot, power):
    """Not the step: what is summed up of it is as many times as large."""
    q, k, v = torch.randn(3, 2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(2, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slots = []
    for w in (weight, torch.ones_like(weight)):
        spec = {"optimizer": {"kind": kind, "weight": "sigmoid", "eps": 1e-2}, "objective": "l2"}
        slots.append(ttr.regress(q, k, v, spec, step=0.1, weight=w, **({"momentum": 0.5} if kind == "muon" else {}))[1].slots[slot]["W"])
    torch.testing.assert_close(slots[0], weight[:, 0, :, None, None] ** power * slots[1])
