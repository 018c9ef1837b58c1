"""Every composition is its published layer: outputs and gradients against the transcriptions, in float64, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transcriptions import compositions as tr
from transcriptions.nonlinear import Memory

import ttr
from ttr.layers import ComposedLayer, Mixer

D, B, T, P = 16, 2, 17, 3
MEMORY = {"compose.memory.optimizer.mini_batch": 4, "compose.memory.layer.n_heads": 2}
WINDOW = {"compose.window.regressor.window": 5, "compose.window.layer.n_heads": 4}
OVERRIDES = {
    "titans_mac": {**MEMORY, "compose.attention.layer.n_heads": 4, "compose.segment": 6, "compose.persistent": P},
    "titans_mag": {**MEMORY, **WINDOW, "compose.persistent": P},
    "titans_mal": {**MEMORY, **WINDOW, "compose.persistent": P},
    # rates at which the small constants under the square roots, which the transcription has not, are nothing
    "lact_layer": {**MEMORY, **WINDOW, "compose.memory.gate.eps": 1e-7, "compose.memory.optimizer.weight.bias": 0.0},
}


def make(name: str, **more) -> ComposedLayer:
    """A float64 layer whose parameters all lie off where they begin, so that none is without effect."""
    torch.manual_seed(0)
    layer = ttr.layer(D, ttr.declare(name, **{**OVERRIDES[name], **more})).double()
    assert isinstance(layer, ComposedLayer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def tokens() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def signals(mixer: Mixer) -> dict[str, Tensor]:
    """The rows of the fused signal projection, by signal."""
    names = mixer.signals.fused_names["x"]
    parts = mixer.signals.fused["x"].weight.split([mixer.signals.sizes[n].total for n in names])
    return dict(zip(names, parts, strict=True))


def attention(mixer: Mixer, projections: Mixer) -> tr.Attention:
    return tr.Attention(*(getattr(projections, f"{name}_proj").weight for name in "qkv"), n_heads=mixer.sizes.heads)


def long_term_memory(mixer: Mixer, W_o: Tensor | None) -> tr.LongTermMemory:
    rows, spec = signals(mixer), mixer.spec
    W = {name: getattr(mixer, f"{name}_proj").weight for name in "qkv"} | {"gate": rows["output_1"]}
    return tr.LongTermMemory(
        W=W if W_o is None else {**W, "o": W_o},
        conv={name: mixer.streams[name].after[0].weight for name in "qkv"},
        rates={"theta": rows["step"], "eta": rows["momentum"], "keep": rows["log_decay"]},
        keep_bias=mixer.signals.bias["log_decay"].flatten(),
        weights=[mixer.params["W1"], mixer.params["W2"]],
        network=Memory(mixer.params["norm_weight"], mixer.params["norm_bias"], spec.regressor.residual, "erf"),
        norm=mixer.output_stages[0].weight[0],
        mini_batch=spec.mini_batch,
    )


def gate(layer: ComposedLayer) -> tr.Gate:
    return tr.Gate(layer.gate.attention_norm.weight, layer.gate.memory_norm.weight)


def mac(layer: ComposedLayer, x: Tensor) -> Tensor:
    memory = long_term_memory(layer.memory, layer.memory.o_proj.weight)
    a = attention(layer.attention, layer.attention)
    return tr.mac(x, layer.persistent, memory, a, layer.attention.o_proj.weight, gate(layer), layer.o_proj.weight, layer.spec.segment)


def mag(layer: ComposedLayer, x: Tensor) -> Tensor:
    a, window = attention(layer.window, layer.window), layer.spec.window.regressor.window
    return tr.mag(x, layer.persistent, long_term_memory(layer.memory, None), a, gate(layer), layer.o_proj.weight, window)


def mal(layer: ComposedLayer, x: Tensor) -> Tensor:
    memory = long_term_memory(layer.memory, layer.memory.o_proj.weight)
    a, window = attention(layer.window, layer.window), layer.spec.window.regressor.window
    return tr.mal(x, layer.persistent, memory, a, layer.window.o_proj.weight, window)


def lact_layer(layer: ComposedLayer, x: Tensor) -> Tensor:
    memory, rows = layer.memory, signals(layer.memory)
    return tr.lact_layer(
        x, attention(layer.window, memory), layer.o_proj.weight,
        affine={name: (memory.streams[name].after[0].weight, memory.streams[name].after[0].bias) for name in "qk"},
        W_rates=rows["weight"], rate_bias=memory.signals.bias["weight"], W_momentum=rows["momentum"], W_gate=rows["output_1"],
        norm=memory.output_stages[0].weight[0],
        **{f"W_{i}": memory.params[f"W{i + 1}"].mT for i in range(3)},
        chunk=memory.spec.mini_batch, window=layer.spec.window.regressor.window,
    )  # fmt: skip


PUBLISHED: dict[str, Callable[[ComposedLayer, Tensor], Tensor]] = {
    "titans_mac": mac, "titans_mag": mag, "titans_mal": mal, "lact_layer": lact_layer,
}  # fmt: skip


def test_every_composition_has_a_transcription():
    assert sorted(PUBLISHED) == sorted(OVERRIDES) == ttr.compositions()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_composition_is_the_published_layer(name):
    layer, x = make(name), tokens().requires_grad_()
    weigh = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y, expected = layer(x), PUBLISHED[name](layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    leaves = {"x": x, **dict(layer.named_parameters())}
    got, want = (torch.autograd.grad((o * weigh).sum(), list(leaves.values())) for o in (y, expected))
    for leaf, a, b in zip(leaves, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


@pytest.mark.parametrize("more", [{"compose.segment": 1}, {"compose.segment": 64}, {"compose.memory.optimizer.mini_batch": 6}])
def test_mac_at_other_segments(more):
    layer, x = make("titans_mac", **more), tokens()
    torch.testing.assert_close(layer(x), mac(layer, x), rtol=1e-9, atol=1e-9)
