"""The signal projection: shapes, published initialisations, sources, ties; head sizes; overrides and their errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ttr
from ttr.layers import Mixer
from ttr.layers.sizes import head_sizes


def signals_of(mixer: Mixer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return mixer.inputs(x).signals


def test_mamba_initialisation():
    torch.manual_seed(0)
    maps = Mixer(256, "kda").signals.maps["log_decay"]
    assert maps["A_log"].shape == (2,) and maps["dt_bias"].shape == (2, 128)
    dt = F.softplus(maps["dt_bias"])
    assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 0.1 * 1.01
    assert 0.3 < (dt.log() < math.log(0.01)).float().mean() < 0.7  # log-uniform
    assert (maps["A_log"].exp() >= 1).all() and (maps["A_log"].exp() <= 16).all()


def test_biases_start_where_they_are_declared():
    mlstm = Mixer(512, "mlstm").signals.bias
    assert torch.equal(mlstm["log_decay"][:, 0], torch.linspace(3, 6, 4)) and (mlstm["step"] == -10).all()
    rwkv7 = Mixer(128, "rwkv7").signals.bias
    assert torch.allclose(rwkv7["log_decay"].flatten(), torch.linspace(-5.5, 0.5, 128))
    decay = -0.6065306597126334 * torch.sigmoid(rwkv7["log_decay"])
    assert (decay.exp() > 0.545).all() and (decay < 0).all()


def test_one_projection_for_all_full_rank_signals_of_a_source():
    mixer = Mixer(64, "gated_deltanet", n_heads=2)
    assert list(mixer.signals.fused) == ["x"] and mixer.signals.fused["x"].out_features == 2 + 2 + 96
    assert not mixer.signals.low_rank
    kda = Mixer(64, "kda").signals
    assert sorted(kda.low_rank) == ["log_decay", "output_1"] and kda.low_rank["log_decay"].down.out_features == 64


def test_output_gates_are_made_where_they_are_used():
    for name, full_rank in (("gated_deltanet", True), ("kda", False)):
        mixer, x = Mixer(64, name, n_heads=2), torch.randn(2, 5, 64)
        call, _ = mixer._begin(x, None, None)
        mixer._inputs(call)
        assert set(call.late) == {"output_1"} and "output_1" not in call.signals
        of = mixer.signals
        z = of.fused["x"](x)[..., -of.sizes["output_1"].total :] if full_rank else of.low_rank["output_1"](x)
        gate = of.signals["output_1"].map(z.unflatten(-1, of.sizes["output_1"].shape), {})
        torch.testing.assert_close(call.late["output_1"](call), gate)


def test_mamba2_writes_with_the_gates_own_time_step():
    torch.manual_seed(0)
    mixer, x = Mixer(64, "mamba2").double(), torch.randn(2, 5, 64, dtype=torch.float64)
    values = signals_of(mixer, x)
    A = mixer.signals.maps["log_decay"]["A_log"].exp()
    assert torch.allclose(values["log_decay"], -A * values["step"])
    assert "step" not in mixer.signals.maps and mixer.signals.fused["x"].out_features == 2 + 128


def test_an_output_gate_may_be_the_gates_time_step():
    torch.manual_seed(0)
    declared = {"kind": "gate", "tie": "gate.dt", "per": "head", "scale": 0.5}
    mixer, x = Mixer(64, "mamba2", n_heads=2, output=[declared]).double(), torch.randn(2, 5, 64, dtype=torch.float64)
    call, _ = mixer._begin(x, None, None)
    mixer._inputs(call)
    o = torch.randn(2, 5, 2, mixer.dv, dtype=torch.float64)
    expected = o * 0.5 * call.signals["step"][..., None]
    torch.testing.assert_close(mixer._read_out(o, call), expected.flatten(2))
    assert mixer(x).isfinite().all() and "output_0" not in mixer.signals.fused_names["x"]


def test_softcap_and_scale():
    spec = ttr.spec("deltanet", **{"optimizer.step": {"map": "identity", "softcap": 0.5, "scale": 2.0, "bias": 1.0}})
    torch.manual_seed(0)
    mixer, x = Mixer(16, spec), torch.randn(1, 4, 16)
    z = mixer.signals.fused["x"](x) + mixer.signals.bias["step"].flatten()
    assert torch.allclose(signals_of(mixer, x)["step"], 2 * 0.5 * torch.tanh(z / 0.5))


def test_sources():
    for source, width in (("qkv", 16 * 3), ("v", 16), ("shift", 16)):
        spec = ttr.spec("deltanet", **{"optimizer.step": {"source": source}, "layer.qk": [], "layer.v": []})
        torch.manual_seed(0)
        mixer, x = Mixer(16, spec), torch.randn(1, 4, 16)
        assert mixer.signals.fused[source].in_features == width
        if source == "qkv":
            read = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
        elif source == "v":
            read = mixer.v_proj(x)
        else:
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            read = x + mixer.signals.shift["fused"].mix * (before - x)
        assert torch.allclose(signals_of(mixer, x)["step"], torch.sigmoid(mixer.signals.fused[source](read)), atol=1e-6)


def test_micro_steps_have_their_own_pairs_and_steps():
    mixer, x = Mixer(64, "deltaproduct", n_heads=2), torch.randn(2, 5, 64)
    given = mixer.inputs(x)
    assert given.k.shape == (2, 5, 3, 2, 32) and given.v.shape == (2, 5, 3, 2, 32) and given.q.shape == (2, 5, 2, 32)
    assert given.signals["step"].shape == (2, 5, 3, 2)
    shared = Mixer(64, ttr.spec("deltaproduct", **{"optimizer.pairs": "shared"}), n_heads=2)
    given = shared.inputs(x)
    assert given.k.shape == (2, 5, 2, 32) and given.signals["step"].shape == (2, 5, 3, 2)
    assert torch.isfinite(shared(x)).all()


def test_lightning_knows_its_layer():
    decays = [signals_of(Mixer(64, "lightning", layer_idx=i, n_layers=4, n_heads=2), torch.randn(1, 2, 64)) for i in (0, 3)]
    assert decays[0]["log_decay"].tolist() == [0, -4.0] and decays[1]["log_decay"].tolist() == [0, -1.0]
    with pytest.raises(ValueError, match="layer_idx=4"):
        Mixer(64, "lightning", layer_idx=4, n_layers=4)


@pytest.mark.parametrize(
    ("name", "d_model", "overrides", "expected"),
    [
        ("gated_deltanet", 2048, {"head_dim": 256}, (6, 6, 256, 512)),
        ("mamba2", 1024, {}, (32, 1, 128, 64)),
        ("longhorn", 1024, {}, (32, 1, 16, 64)),
        ("kda", 64, {}, (1, 1, 64, 64)),
        ("retnet", 128, {}, (2, 2, 64, 128)),
        ("deltanet", 96, {"n_heads": 3}, (3, 3, 32, 32)),
        ("deltanet", 64, {"n_heads": 4, "n_key_heads": 2, "expand_v": 2.0}, (4, 2, 16, 32)),
        ("deltanet", 64, {"expand_k": 0.25}, (1, 1, 16, 64)),
    ],
)
def test_sizes(name, d_model, overrides, expected):
    s = head_sizes(ttr.spec(name, **{f"layer.{k}": v for k, v in overrides.items()}), d_model)
    assert (s.heads, s.key_heads, s.key_width, s.value_width) == expected


def test_heads_that_are_asked_for_are_made_or_refused():
    """A declaration's head_dim is for any width, a layer's own for this one."""
    assert Mixer(512, "gated_deltanet", head_dim=96).dk == 96 == Mixer(512, "gated_deltanet", n_heads=4, head_dim=96).dk
    with pytest.raises(ValueError, match=r"head_dim=100: expand_k \* d_model = 384 has no such heads; choose from .* 96, 128, 192, 384\]"):
        Mixer(512, "gated_deltanet", head_dim=100)
    with pytest.raises(ValueError, match=r"head_dim=32: .* in n_heads=4 heads makes keys of 96; leave head_dim out, or give n_heads=None"):
        Mixer(512, "gated_deltanet", n_heads=4, head_dim=32)
    with pytest.raises(ValueError, match=r"n_heads=3 does not divide expand_k \* d_model = 256; choose from \[1, 2, 4, "):
        Mixer(256, "kda", n_heads=3)


def test_grouped_heads_read_with_their_groups_keys():
    torch.manual_seed(0)
    mixer, x = Mixer(64, "gated_deltanet", n_heads=4, n_key_heads=2, expand_v=2), torch.randn(2, 6, 64)
    given = mixer.inputs(x)
    assert given.q.shape == (2, 6, 2, 12) and given.v.shape == (2, 6, 4, 32) and given.signals["step"].shape == (2, 6, 4)
    assert torch.isfinite(mixer(x)).all()


def test_a_feature_map_widens_the_keys_and_what_goes_with_them():
    torch.manual_seed(0)
    mixer = Mixer(32, "kda", n_heads=2, qk=[{"kind": "dpfp", "nu": 1}, "l2"])
    assert (mixer.dk, mixer.dv) == (32, 16) and mixer.signals.maps["log_decay"]["dt_bias"].shape == (2, 32)
    x = torch.randn(1, 5, 32)
    assert torch.isfinite(mixer(x)).all() and mixer.init_state(3).memory.weights["W"].shape == (3, 2, 32, 16)


def test_separate_write_key_defaults_to_the_keys_stages():
    spec = {"optimizer": {"kind": "delta", "write_key": "separate"}}
    mixer = Mixer(32, spec, n_heads=2)
    assert mixer.write_key_proj.weight.shape == (32, 32) and torch.isfinite(mixer(torch.randn(1, 4, 32))).all()


def test_low_rank_projection_of_a_stream():
    mixer = Mixer(32, "deltanet", q=[{"kind": "proj", "rank": 4}, "l2"], k=[{"kind": "proj", "share": "q"}, "conv", "l2"])
    assert mixer.q_proj.down.weight.shape == (4, 32) and not hasattr(mixer, "k_proj")
    assert torch.isfinite(mixer(torch.randn(1, 4, 32))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixer(64, "gated_deltanet", n_head=4), "Did you mean 'n_heads'?"),
        (lambda: Mixer(64, "gated_deltanet", n_heads=5), "layer.n_heads=5 does not divide expand_k * d_model = 48"),
        (lambda: Mixer(64, "deltanet", n_heads=4, n_key_heads=3), "n_key_heads=3 does not divide layer.n_heads=4"),
        (lambda: Mixer(128, "gla", n_key_heads=3), "n_key_heads=3 does not divide the 1 heads"),
        (lambda: Mixer(64, "deltanets"), "Did you mean 'deltanet'?"),
        (lambda: Mixer(64, "titans", path="chunk"), "path='chunk' cannot serve"),
        (lambda: Mixer(64, "deltanet", path={"kind": "chunk", "chunksize": 4}), "option='chunksize' is not known; choose from"),
        (lambda: Mixer(64, ttr.spec("deltanet", **{"optimizer.step": {"tie": "gate.dt"}})), "there is none"),
        (lambda: Mixer(64, ttr.spec("kda", **{"optimizer.step": {"tie": "gate.dt"}})), "they must agree"),
        (lambda: Mixer(64, "deltanet")(torch.randn(2, 3, 32)), "expected [B, T, 64]"),
        (lambda: Mixer(64, "deltanet")(torch.randn(2, 3, 64), mask=torch.ones(2, 3)), "expected torch.bool [2, 3]"),
        (lambda: Mixer(64, "deltanet")(torch.randn(2, 3, 64), cu_seqlens=torch.tensor([0, 3])), "B = 1"),
        (lambda: Mixer(64, "deltanet").step(torch.randn(2, 1, 64), None), "expected [B, 64]"),  # type: ignore[arg-type]
    ],
)
def test_errors_say_what_came_and_what_was_expected(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_mixer_says_how_it_runs():
    text = repr(Mixer(64, "gated_deltanet"))
    path, reason = ttr.select_path("gated_deltanet")
    assert f"path={path} ({reason})" in text and "gated_deltanet: d_model=64" in text
