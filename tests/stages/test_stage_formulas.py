"""Every stage against its formula, and where a stage may stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import ttr
from ttr.layers import Mixer
from ttr.layers.streams import build
from ttr.layers.streams import run as run_stages
from ttr.registry import STAGES, stage
from ttr.stages import GELU, Call, Conv, SiLU, Stage, StreamSize, Timeline
from ttr.stages.conv import ConvModule

B, T, H, D = 2, 7, 3, 4


@pytest.fixture
def x():
    return torch.randn(B, T, H, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(kind: str, x, name: str = "q", streams=None, signals=None, late=None, micro_steps: int = 1, **fields):
    """A stage built for x and run on it, with random parameters."""
    declared = STAGES.get(kind)(**fields)
    heads, width = x.shape[2:]
    size = StreamSize(
        name=name, key=f"{name}_0", heads=heads, width=width, micro_steps=micro_steps, d_model=heads * width,
        keys=(heads, width), mini_batch=4,
    )  # fmt: skip
    module = declared.build(size).double()
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    call = Call(x=x.flatten(2), timeline=Timeline(B), streams=streams or {}, signals=signals or {}, late=late or {})
    call.position, _ = call.timeline.position(x, torch.zeros(B, dtype=torch.long))
    y = module(x, call)
    assert y.shape[-1] == declared.width(x.shape[-1])
    return y, module


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("silu", F.silu), ("relu", F.relu), ("gelu", F.gelu), ("elu1", lambda x: F.elu(x) + 1)],
)
def test_activations(kind, formula, x):
    assert torch.equal(run(kind, x)[0], formula(x))


def test_dpfp_takes_the_negative_half_as_relu_of_minus_x(x):
    y, _ = run("dpfp", x, nu=2)
    r = torch.cat([F.relu(x), F.relu(-x)], -1)
    expected = [r[..., i] * r[..., (i - j) % (2 * D)] for j in (1, 2) for i in range(2 * D)]
    assert torch.equal(y, torch.stack(expected, -1))
    assert (y >= 0).all() and (run("dpfp", -x.abs(), nu=2)[0] > 0).any()  # negative inputs are seen too


def test_taylor_products_are_the_second_order_expansion_of_exp(x):
    phi, _ = run("taylor", x)
    s = (x[0, 0, 0] @ x[1, 3, 2]) / math.sqrt(D)
    assert torch.allclose(phi[0, 0, 0] @ phi[1, 3, 2], 1 + s + s * s / 2)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomial_products_are_powers(x, degree):
    phi, _ = run("polynomial", x, degree=degree)
    assert phi.shape[-1] == math.comb(D + degree, degree)
    assert torch.allclose(phi[0, 0, 0] @ phi[1, 3, 2], (1 + x[0, 0, 0] @ x[1, 3, 2]) ** degree)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomial_products_are_the_expansion_of_exp(x, degree):
    phi, _ = run("polynomial", x, degree=degree, products="exp")
    s = x[0, 0, 0] @ x[1, 3, 2]
    assert torch.allclose(phi[0, 0, 0] @ phi[1, 3, 2], sum(s**i / math.factorial(i) for i in range(degree + 1)))


def test_hedgehog(x):
    y, module = run("hedgehog", x, features=5)
    z = x[1, 2, 1] @ module.weight[1]
    assert torch.allclose(y[1, 2, 1], torch.cat([z.softmax(-1), (-z).softmax(-1)]))
    module.reset_parameters()
    assert torch.equal(module.weight[2], torch.eye(D, 5, dtype=torch.float64))


def test_key_norms(x):
    assert torch.allclose(run("l2", x)[0], x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.allclose(run("l2", x, eps=0.0)[0].norm(dim=-1), torch.ones(B, T, H, dtype=x.dtype))
    positive = x.exp()
    assert torch.allclose(run("sum", positive)[0], positive / (positive.sum(-1, keepdim=True) + 1e-6))


def test_norm_over_all_heads_keeps_micro_steps_apart(x):
    six = torch.cat([x, 2 * x], 2)  # two micro-steps of three heads
    y, _ = run("l2", six, over="all", micro_steps=2)
    assert torch.allclose(y[:, :, :3], x / (x.square().sum((-1, -2), keepdim=True) + 1e-6).sqrt())
    assert torch.allclose(y[:, :, :3], y[:, :, 3:], atol=1e-6)


@pytest.mark.parametrize("affine", ["none", "shared", "heads"])
def test_rms_and_layer_norm(x, affine):
    for kind, reference in (("rms", F.rms_norm), ("layer", F.layer_norm)):
        y, module = run(kind, x, affine=affine, bias=True)
        expected = reference(x, (D,), eps=1e-5)
        if affine != "none":
            assert module.weight.shape == ((H, D) if affine == "heads" else (1, D))
            expected = expected * module.weight + module.bias
        assert torch.allclose(y, expected)


@pytest.mark.parametrize("over", ["head", "all"])
@pytest.mark.parametrize("affine", ["shared", "heads"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rms_by_one_step_of_torch_and_by_its_formula(x, over, affine, dtype):
    """A weight of another dtype than x's is the formula's."""
    x = x.to(dtype).requires_grad_()
    y, module = run("rms", x, over=over, affine=affine)
    assert module.weight.dtype == torch.float64
    axes = -1 if over == "head" else (-2, -1)
    expected = (x.double() * (x.double().square().mean(axes, keepdim=True) + 1e-5).rsqrt() * module.weight).to(dtype)
    torch.testing.assert_close(y, expected)
    leaves = x, module.weight
    got, gradients = torch.autograd.grad(y.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves)
    torch.testing.assert_close(got, gradients, rtol=1e-5, atol=1e-5)


def test_rms_takes_one_step_of_torch_and_keeps_the_dtype(x, monkeypatch):
    """CUDA's autocast has the step give float32 out."""
    taken, step = [], F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args: taken.append(args) or step(*args).float())
    module = STAGES.get("rms")().build(
        StreamSize(name="q", key="q_0", heads=H, width=D, micro_steps=1, d_model=H * D, keys=(H, D), mini_batch=4)
    )
    for dtype, steps in ((torch.float32, 1), (torch.bfloat16, 1)):
        assert module(x.to(dtype), None).dtype == dtype
        assert len(taken) == steps
    assert module.bfloat16()(x.bfloat16(), None).dtype == torch.bfloat16
    assert len(taken) == 2


def test_group_norm_is_layer_norm_per_head(x):
    y, module = run("layer", x, eps=1e-3)
    flat = F.group_norm(x.flatten(2).flatten(0, 1), H, module.weight.flatten(), module.bias.flatten(), eps=1e-3)
    assert torch.allclose(y.flatten(2).flatten(0, 1), flat)


def test_rope_scores_depend_on_distance_only(x):
    same = x[:, :1].expand_as(x)
    y, _ = run("rope", same)
    assert torch.allclose(y.norm(dim=-1), same.norm(dim=-1))
    scores = torch.einsum("thd,shd->hts", y[0], y[0])
    for gap in range(1, T):
        diagonal = scores.diagonal(gap, 1, 2)
        assert torch.allclose(diagonal, diagonal[:, :1].expand_as(diagonal))
    assert torch.allclose(y[:, 0], same[:, 0]) and not torch.allclose(y[:, 1], same[:, 1])


def test_rope_turns_pairs_half_a_head_apart(x):
    y, _ = run("rope", x, theta=100.0)
    t, i = 3, 1
    angle = t * 100.0 ** (-2 * i / D)
    left, right = x[0, t, 0, i], x[0, t, 0, i + D // 2]
    assert torch.allclose(y[0, t, 0, i], left * math.cos(angle) - right * math.sin(angle))
    assert torch.allclose(y[0, t, 0, i + D // 2], left * math.sin(angle) + right * math.cos(angle))


def test_rope_modulo(x):
    same = x[:, :1].expand_as(x)
    for modulo in (4, "mini_batch"):
        y, _ = run("rope", same, modulo=modulo)
        assert torch.equal(y[:, 4:7], y[:, 0:3])


def test_conv_is_torchs_causal_depthwise_convolution(x):
    y, module = run("conv", x, kernel_size=3, bias=True)
    channels = x.flatten(2).transpose(1, 2)
    expected = F.conv1d(F.pad(channels, (2, 0)), module.weight[:, None], module.bias, groups=H * D)
    assert torch.allclose(y.flatten(2).transpose(1, 2), expected)


def test_conv_of_one_is_a_scale(x):
    y, module = run("conv", x, kernel_size=1)
    assert torch.allclose(y.flatten(2), x.flatten(2) * module.weight[:, 0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_silu_behind_a_convolution_is_done_by_it(kernel_size, bias, x, monkeypatch):
    size = StreamSize(name="q", heads=H, width=D, d_model=H * D)
    call = Call(x=x.flatten(2), timeline=Timeline(B))
    for following, activation, joined in ((SiLU(), F.silu, True), (GELU(), F.gelu, False)):
        stages = build((Conv(kernel_size=kernel_size, bias=bias), following), size)[0].double()
        expected = activation(stages[0](x, call))
        with monkeypatch.context() as patch:
            if joined:
                patch.setattr(SiLU, "__call__", lambda *_: pytest.fail("a step of its own"))
            assert torch.allclose(run_stages(stages, x, call), expected)


class Squared(ConvModule):
    """A third party's convolution, which knows nothing of what stands behind it."""

    def forward(self, x, call):
        return call.convolve(self.key, x.flatten(2), self.weight.square()).reshape(x.shape)


def test_silu_is_not_lost_where_another_convolution_stands(x):
    size = StreamSize(name="q", heads=H, width=D, d_model=H * D)
    call = Call(x=x.flatten(2), timeline=Timeline(B))
    stages = build((Conv(kernel_size=3), SiLU()), size)[0].double()
    stages[0] = Squared(Conv(kernel_size=3), size).double()
    assert torch.allclose(run_stages(stages, x, call), F.silu(stages[0](x, call)))


def test_a_hook_on_a_convolution_or_its_silu_sees_what_it_makes(x):
    size = StreamSize(name="q", heads=H, width=D, d_model=H * D)
    call, seen = Call(x=x.flatten(2), timeline=Timeline(B)), []
    for hooked in (0, 1):
        stages = build((Conv(kernel_size=3), SiLU()), size)[0].double()
        before = stages[0](x, call)
        stages[hooked].register_forward_hook(lambda _module, _args, y: seen.append(y))
        y = run_stages(stages, x, call)
        assert torch.allclose(seen.pop(), y if hooked else before) and torch.allclose(y, F.silu(before))


def test_affine_and_layer_scale(x):
    y, module = run("affine", x)
    assert torch.allclose(y, x * module.weight + module.bias)
    y, module = run("layer_scale", x, initial=0.71)
    assert torch.allclose(y, x * module.weight)
    module.reset_parameters()
    assert torch.allclose(module.weight, torch.full((H, D), 0.71, dtype=x.dtype))


def test_blend(x):
    a = torch.rand(B, T, H, D, dtype=x.dtype)
    y, module = run("blend", x, name="write_key", signals={"step": a})
    assert torch.allclose(y, x * (1 + (a - 1) * module.weight))
    with pytest.raises(ttr.SpecError, match="blend needs 'step' per key channel"):
        run("blend", x, name="write_key", signals={"step": a[..., 0]})


def test_gate_skip_and_bonus(x):
    v, k, q = x.exp(), x.sin(), x.cos()
    for gate in (x[..., 0], x):
        y, _ = run("gate", v, name="output", late={"output_0": lambda call, gate=gate: gate})
        assert torch.allclose(y, v * (gate if gate.ndim == 4 else gate[..., None]))
    y, module = run("skip", x, name="output", streams={"v": v})
    assert torch.allclose(y, x + module.D * v) and module.D.shape == (H, 1)
    y, module = run("bonus", x, name="output", streams={"q": q, "k": k, "v": v})
    assert torch.allclose(y, x + torch.einsum("bthd,hd,bthd->bth", q, module.weight, k)[..., None] * v)
    y, module = run("bonus", x, name="output", streams={"q": q, "k": x, "v": v, "write_key": k})
    assert torch.allclose(y, x + torch.einsum("bthd,hd,bthd->bth", q, module.weight, k)[..., None] * v)


def test_shift_mixes_with_the_token_before_and_starts_as_rwkv7():
    mixer = Mixer(8, "rwkv7", layer_idx=1, n_layers=4, head_dim=4)
    mix = mixer.streams["k"].before[0].mix
    assert torch.allclose(mix, 1 - (torch.arange(8) / 8) ** (0.7 * 0.75))
    x = torch.randn(1, 3, 8)
    call, _ = mixer._begin(x, None, None)
    shifted = mixer.streams["k"].input(call)
    assert torch.allclose(shifted[:, 1:], x[:, 1:] + mix * (x[:, :-1] - x[:, 1:]))
    assert torch.allclose(shifted[:, 0], x[:, 0] - mix * x[:, 0])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"q": ["gate"]}, "gate' belongs to `output` only"),
        ({"v": ["rope"]}, "belongs to ['q', 'k', 'write_key']"),
        ({"q": ["proj", "silu", "proj"]}, "names proj 2 times"),
        ({"q": ["proj", "shift"]}, "put it before proj"),
        ({"v": [{"kind": "proj", "source": "v"}]}, "would project itself"),
        ({"q": [{"kind": "proj", "share": "q"}]}, "must name another stream"),
        ({"k": ["dpfp"]}, "must be equally wide"),
        ({"output": [{"kind": "proj"}]}, "is implied"),
        ({"q": ["taylro"]}, "Did you mean 'taylor'?"),
        ({"q": [{"kind": "conv", "kernel_size": 0}]}, "kernel_size=0"),
        ({"q": [{"kind": "rope", "modulo": 0}]}, "rope.modulo=0"),
    ],
)
def test_stages_where_they_do_not_belong(stages, message):
    with pytest.raises(ttr.SpecError) as error:
        Mixer(16, "deltanet", head_dim=8, **stages)
    assert message in str(error.value)


def test_odd_heads_cannot_turn():
    with pytest.raises(ttr.SpecError, match="odd head width 5"):
        Mixer(15, "softmax", n_heads=3)


def test_what_passes_by_needs_one_value_per_token():
    with pytest.raises(ttr.SpecError, match="steps=2"):
        Mixer(16, "gated_deltaproduct", output=["skip"])


def test_a_feature_map_of_ones_own_is_a_formula():
    @stage("cubed")
    @dataclass(frozen=True, kw_only=True)
    class Cubed(Stage):
        def __call__(self, x):
            return x**3

    try:
        mixer = Mixer(16, "deltanet", qk=["cubed", "l2"], n_heads=2)
        call, _ = mixer._begin(torch.randn(1, 3, 16), None, None)
        q = mixer._inputs(call).q
        expected = mixer.q_proj(call.x).unflatten(-1, (2, 8)) ** 3
        assert torch.allclose(q, expected * torch.rsqrt(expected.square().sum(-1, keepdim=True) + 1e-6))
        assert "cubed" in repr(mixer)
    finally:
        del STAGES._classes["cubed"]
