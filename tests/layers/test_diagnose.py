"""`diagnose`: inner losses are those of the weights themselves, worked out from states of prefixes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ttr
from ttr.layers import LM, Mixer
from ttr.layers.diagnose import diagnose

T, D = 9, 32


def prefix_weights(mixer: Mixer, x: torch.Tensor) -> list[torch.Tensor]:
    """W [B, Hv, dk, dv] before the first token and after every token."""
    return [mixer.prefill(x[:, :t])[1].memory.weights["W"] for t in range(T + 1)]


def l2(W, k, v):
    return 0.5 * (torch.einsum("bhkv,bhk->bhv", W, k) - v).square().sum(-1)


def make(spec, **overrides):
    torch.manual_seed(0)
    return Mixer(D, spec, n_heads=2, **overrides).double(), torch.randn(2, T, D, dtype=torch.float64)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda", "momentum_deltanet"])
def test_losses_of_one_pair_per_token(name):
    mixer, x = make(name)
    report = diagnose(mixer, x)["mixer"]
    given, W = mixer.inputs(x), prefix_weights(mixer, x)
    for t in range(T):
        k, v = given.k[:, t], given.v[:, t]
        assert torch.allclose(report.loss_before[:, t], l2(W[t], k, v))
        assert torch.allclose(report.loss_after[:, t], l2(W[t + 1], k, v))
    assert torch.equal(report.step, given.signals["step"])
    assert torch.allclose(report.state_norm, W[T].flatten(2).norm(dim=-1))
    if name == "deltanet":
        assert report.decay is None
        assert torch.allclose(report.loss_after, report.loss_before * (1 - given.signals["step"]).square(), atol=1e-4)
    elif name != "momentum_deltanet":
        assert torch.equal(report.decay, given.signals["log_decay"].exp())


def test_losses_of_several_pairs_per_token_are_averaged():
    mixer, x = make("deltaproduct")
    report, given, W = diagnose(mixer, x)["mixer"], mixer.inputs(x), prefix_weights(mixer, x)
    for t in range(T):
        before = torch.stack([l2(W[t], given.k[:, t, j], given.v[:, t, j]) for j in range(3)]).mean(0)
        assert torch.allclose(report.loss_before[:, t], before)


def test_a_separate_write_key_splits_the_loss():
    mixer, x = make("rwkv7")
    report, given, W = diagnose(mixer, x)["mixer"], mixer.inputs(x), prefix_weights(mixer, x)
    for t in range(T):
        erased = torch.einsum("bhkv,bhk->bhv", W[t + 1], given.k[:, t])
        written = torch.einsum("bhkv,bhk->bhv", W[t + 1], given.write_key[:, t])
        expected = 0.5 * erased.square().sum(-1) - (written * given.v[:, t]).sum(-1)
        assert torch.allclose(report.loss_after[:, t], expected)


def test_accumulated_steps_are_seen_after_their_mini_batch():
    spec = {"optimizer": {"kind": "delta", "mini_batch": 4, "accumulate": True}, "read": "before"}
    mixer, x = make(spec)
    report, given, W = diagnose(mixer, x)["mixer"], mixer.inputs(x), prefix_weights(mixer, x)
    for t in range(T):
        k, v, start = given.k[:, t], given.v[:, t], t - t % 4
        assert torch.allclose(report.loss_before[:, t], l2(W[start], k, v))
        if t < 5:
            assert torch.allclose(report.loss_after[:, t], l2(W[start + 4], k, v))
    assert torch.isnan(report.loss_after[:, 5:]).all()


@pytest.mark.parametrize("name", ttr.presets())
def test_every_preset_masked_and_not(name):
    torch.manual_seed(0)
    spec = ttr.spec(name)
    spec = ttr.spec(spec, **{"optimizer.mini_batch": 2}) if spec.mini_batch != 1 else spec
    mixer, x = Mixer(D, spec).double(), torch.randn(2, T, D, dtype=torch.float64)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :3] = False
    report, short = diagnose(mixer, x, mask=mask)["mixer"], diagnose(mixer, x[1:, 3:])["mixer"]
    assert torch.allclose(report.state_norm[1:], short.state_norm)
    if name.startswith("softmax"):
        assert report.loss_before is None and report.loss_after is None
        return
    for field in ("loss_before", "loss_after"):
        assert torch.allclose(getattr(report, field)[1:, 3:], getattr(short, field), atol=1e-9, equal_nan=name == "lact")
        assert torch.isfinite(getattr(short, field)[:, 0]).all()
        assert getattr(report, field).shape == (2, T, mixer.sizes.heads)
    if name in ("deltanet", "ttt_linear", "ttt_mlp", "mesanet", "longhorn"):
        assert (report.loss_after <= report.loss_before + 1e-9).all()


def test_any_module_with_mixers_and_no_trace_left():
    torch.manual_seed(0)
    lm = LM(11, D, ["gated_deltanet", "softmax"])
    tokens = torch.randint(0, 11, (2, 5))
    before = lm(tokens)
    report = diagnose(lm, tokens)
    assert list(report) == ["blocks.0.mixer", "blocks.1.mixer"]
    assert not any(t.requires_grad for t in (report["blocks.0.mixer"].loss_before, report["blocks.1.mixer"].state_norm))
    assert torch.equal(lm(tokens), before) and not any(m._forward_pre_hooks for m in lm.modules())
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module .* got Tensor"):
        diagnose(torch.zeros(3))
    with pytest.raises(ValueError, match=r"Linear contains no ttr\.Mixer"):
        diagnose(nn.Linear(2, 2), torch.randn(1, 2))


def test_objectives_with_signals():
    mixer, x = make({"objective": {"kind": "huber", "threshold": {"map": "softplus"}}, "optimizer": "sgd"})
    report = diagnose(mixer, x)["mixer"]
    assert torch.isfinite(report.loss_before).all() and (report.loss_before >= 0).all()
