"""Forms of one system (F) and its properties (S), through `ttr.regress` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from identities import DK, DV, LA, TITANS, B, Draw, H, T, close, frozen_paths, linear_paths, run
from torch import Tensor

import ttr
from ttr import testing


@pytest.fixture
def draw() -> Draw:
    return Draw()


# Forms


@pytest.mark.parametrize("name", ttr.presets())
def test_f04_a_state_handed_on_continues_the_sequence(name):
    case = testing.random_inputs(ttr.spec(name), T=19, B=1, dk=4, dv=4)
    whole = testing.evaluate(case, gradients=False)
    for splits in ([1], [16], [3, 4, 11]):
        testing.assert_close(testing.evaluate(case, splits=splits, gradients=False), whole, 1e-9, f"{name} split at {splits}")


@pytest.mark.parametrize("name", ttr.presets())
def test_f05_a_changed_token_changes_nothing_before_it(name):
    for path in testing.targets(ttr.spec(name)):
        case = testing.random_inputs(ttr.spec(name), T=19, B=1, dk=4, dv=4, extreme=False)
        o, _ = testing.call(case, path)
        tensors = {n: t.clone() for n, t in case.tensors.items()}
        for t in tensors.values():
            t[:, 11:] = t[:, 11:].flip(-1) * 0.5
        changed, _ = testing.call(testing.replace(case, tensors=tensors), path)
        close(changed[:, :11], o[:, :11], 1e-12)
        assert not torch.allclose(changed[:, 11:], o[:, 11:])


@pytest.mark.parametrize("mini_batch", [2, 3, 7, 64, "sequence"])
@pytest.mark.parametrize("regressor", ["linear", "mlp"])
def test_f06_the_dual_form_is_the_definition_at_any_mini_batch(regressor, mini_batch):
    rules = [
        {"kind": "delta"},
        {"kind": "delta", "steps": 2},
        {"kind": "momentum"},
        {"kind": "momentum", "nesterov": True},
        {"kind": "averaged"},
    ]
    if isinstance(mini_batch, int):
        rules += [{"kind": "delta", "position": "learned"}]
    for rule in rules:
        gate = "none" if "position" in rule else "scalar"
        spec = {"regressor": regressor, "optimizer": {**rule, "mini_batch": mini_batch}, "gate": gate}
        testing.assert_conforms(spec, paths=["dual"], T=10, B=1, dk=3, dv=3)


@frozen_paths
def test_f06_frozen_momentum_is_its_masked_product(draw, path):
    """O = diag(B) Q M_0 - ((Q K^T) * Gamma) E, E = K M_0 - V, Gamma_tj = sum_i (B_t / B_i) theta_j prod_l eta_l."""
    x, theta, eta, decay, M = draw.qkv(), draw.rate(), draw.rate(), draw.log_decay(), draw.state()
    gamma = torch.zeros(B, H, T, T, dtype=torch.float64)
    for t in range(T):
        for j in range(t + 1):
            for i in range(j, t + 1):
                gamma[:, :, t, j] += decay[:, i + 1 : t + 1].sum(1).exp() * theta[:, j] * eta[:, j + 1 : i + 1].prod(1)
    q, k, v = (x[n].transpose(1, 2) for n in ("q", "k", "v"))
    kept = decay.cumsum(1).exp().transpose(1, 2)[..., None]
    expected = kept * (q @ M) - ((q @ k.mT) * gamma) @ (k @ M - v)
    spec = ttr.spec(TITANS, **{"optimizer.mini_batch": T})
    close(run(spec, path, **x, step=theta, momentum=eta, log_decay=decay, initial_state=M)[0], expected.transpose(1, 2))


# Properties


def transition(spec: Any, path: Any, k: Tensor, **signals: Tensor) -> Tensor:
    """The linear map of W over all tokens, by running the identity with values of zero: [B, H, dk, dk]."""
    eye = torch.eye(DK, dtype=torch.float64).expand(B, H, DK, DK)
    return run(spec, path, q=k, k=k, v=torch.zeros_like(k), **signals, initial_state=eye)[1].weights["W"]


@linear_paths
@pytest.mark.parametrize("length", [1, T])
def test_s01_unit_keys_and_steps_up_to_two_never_amplify(draw, path, length):
    k = draw.unit(B, length, H, DK)
    for step in (0.0, 1.0, 2.0, 2 * draw(B, length, H).sigmoid()):
        gated = transition("gated_deltanet", path, k, step=step, log_decay=F.logsigmoid(draw(B, length, H)))
        kda = transition("kda", path, k, step=step, log_decay=F.logsigmoid(draw(B, length, H, DK)))
        for A in (gated, kda, transition("deltanet", path, k, step=step)):
            assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-12
    reflected = transition("deltanet", path, k, step=2.0)
    close(reflected @ reflected.mT, torch.eye(DK, dtype=torch.float64).expand(B, H, DK, DK))


@linear_paths
@pytest.mark.parametrize("step", [1e-3, 1.0, 1e3, 1e9])
def test_s02_an_implicit_step_contracts_whatever_its_size(draw, path, step):
    x, W = {**draw.qkv(1), "k": 3 * draw(B, 1, H, DK)}, draw.state()
    assert torch.linalg.matrix_norm(transition({"optimizer": "implicit"}, path, x["k"], step=step), 2).max() <= 1 + 1e-12
    after = run({"optimizer": "implicit"}, path, **{**x, "q": x["k"]}, step=step, initial_state=W)[0]
    before = torch.einsum("bhkv,bthk->bthv", W, x["k"])
    factor = 1 / (1 + step * x["k"].square().sum(-1, keepdim=True))
    close(after, x["v"] + factor * (before - x["v"]))
    assert ((after - x["v"]).norm(dim=-1) < (before - x["v"]).norm(dim=-1)).all()


def test_s03_rwkv7_s_gate_stays_in_its_range():
    signal = ttr.spec("rwkv7").gate.signals()["log_decay"]
    keep = (signal.scale * signal.map(torch.linspace(-30, 30, 1001, dtype=torch.float64), {})).exp()
    assert (keep > 0.5452).all() and (keep < 1).all()
    assert keep.min() < 0.5453 and keep.max() > 1 - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_s05_mlstm_stays_finite(draw, dtype):
    i = torch.where(draw(B, T, H) > 0, 50.0, -50.0).to(dtype).exp()
    x = {name: t.to(dtype).requires_grad_() for name, t in draw.qkv().items()}
    o, _ = run("mlstm", **x, step=i, log_decay=draw.log_decay().to(dtype))
    gradients = torch.autograd.grad(o.sum(), list(x.values()))
    assert all(torch.isfinite(t).all() for t in (o, *gradients))


@pytest.mark.parametrize("pairs", [4, 8, 16])
def test_s06_error_correction_recalls_better_than_summing(draw, pairs):
    """`pairs` random unit keys of 16 dimensions are written, then queried by tokens that write nothing."""
    many, dk = 64, 16
    k, v = draw.unit(many, pairs, 1, dk), draw(many, pairs, 1, DV)
    x = {"q": torch.cat([k, k], 1), "k": torch.cat([k, torch.zeros_like(k)], 1), "v": torch.cat([v, torch.zeros_like(v)], 1)}
    small = {"ridge": torch.full((1, dk), -9.0, dtype=torch.float64)}
    errors = {
        name: (run(name, **x, **more)[0][:, pairs:] - v).square().mean()
        for name, more in {LA: {}, "deltanet": {"step": 1.0}, "mesa": {"params": small}}.items()
    }
    assert errors["mesa"] < errors["deltanet"] < errors[LA]


@linear_paths
def test_s07_a_step_of_two_counts_parity(draw, path):
    """k = 1, v = 0: each one flips the sign of W. Steps up to one cannot: they leave no negative factor."""
    bits = (draw(B, 64, 1) > 0).double()
    key = torch.ones(B, 64, 1, 1, dtype=torch.float64)
    x = {"q": key, "k": key, "v": 0 * key, "initial_state": torch.ones(B, 1, 1, 1, dtype=torch.float64)}
    parity = 1 - 2 * (bits.cumsum(1) % 2)
    close(run("deltanet", path, **x, step=2 * bits)[0], parity[..., None])
    assert (run("deltanet", path, **x, step=bits)[0] >= 0).all()


@linear_paths
@pytest.mark.parametrize(("symbols", "steps"), [(3, 2), (5, 4)])
def test_s07_reflections_multiply_permutations(draw, path, symbols, steps):
    """A transposition (i j) is the reflection along e_i - e_j; `steps` of them a token write any permutation."""
    length, eye = 20, torch.eye(symbols, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    words = [torch.randperm(symbols, generator=generator).tolist() for _ in range(length)]
    k, on = torch.zeros(1, length, steps, 1, symbols, dtype=torch.float64), torch.zeros(1, length, steps, 1, dtype=torch.float64)
    for t, word in enumerate(words):
        for j, (a, b) in enumerate(transpositions(word)):
            k[0, t, j, 0], on[0, t, j, 0] = (eye[a] - eye[b]) / 2**0.5, 2.0
    q = draw(1, length, 1, symbols)
    spec = ttr.spec("deltaproduct", **{"optimizer.steps": steps})
    o, state = run(spec, path, q=q, k=k, v=torch.zeros_like(k), step=on, initial_state=eye[None, None])
    product, expected = eye, []
    for t, word in enumerate(words):
        product = eye[word] @ product
        expected.append(product.mT @ q[0, t, 0])
    close(o[0, :, 0], torch.stack(expected))
    close(state.weights["W"][0, 0], product)


def transpositions(word: list[int]) -> list[tuple[int, int]]:
    """Swaps of rows that make eye[word] of eye, at most len(word) - 1."""
    rows, swaps = list(range(len(word))), []
    for i, wanted in enumerate(word):
        j = rows.index(wanted)
        if i != j:
            rows[i], rows[j] = rows[j], rows[i]
            swaps.append((i, j))
    return swaps
