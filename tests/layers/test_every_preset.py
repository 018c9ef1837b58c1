"""Every preset as a layer: shapes, decoding, packing, padding, causality, gradients, state."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import ttr
from ttr.layers import Mixer

D, B, T = 64, 2, 21
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
PRESETS = [
    "atlas", "deltanet", "deltaproduct", "gated_deltanet", "gated_deltaproduct", "gla", "kda", "lact", "lightning", "linear_attention",
    "linear_attention_unnormalised", "longhorn", "mamba2", "memora", "mesa", "mesanet", "mlstm", "momentum_deltanet",
    "moneta", "omeganet", "retnet", "rwkv7", "softmax", "softmax_window", "titans", "ttt_linear", "ttt_mlp", "yaad",
]  # fmt: skip
every_preset = pytest.mark.parametrize("name", PRESETS)


def make(name: str, **overrides) -> Mixer:
    """A mixer in float64 with small sizes, so that mini-batches and windows end inside T tokens."""
    torch.manual_seed(0)
    spec = ttr.spec(name)
    if spec.mini_batch != 1:
        spec = ttr.spec(spec, **{"optimizer.mini_batch": 8})
    if name == "softmax_window":
        spec = ttr.spec(spec, **{"regressor.window": 6})
    if name == "yaad":  # errors on both sides of it
        spec = ttr.spec(spec, **{"objective.threshold.bias": 8.0})
    return Mixer(D, spec, layer_idx=1, n_layers=3, **overrides).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_list_is_complete():
    assert ttr.presets() == PRESETS


@every_preset
@pytest.mark.filterwarnings("ignore:lact")  # T tokens are far from one of its mini-batches, of which it warns
def test_tensor_in_tensor_out(name):
    torch.manual_seed(0)
    mixer, x = Mixer(D, name), tokens(B, T).float()
    y = mixer(x)
    assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all()
    assert mixer(x[:, :1]).shape == (B, 1, D) and mixer(x[:, :0]).shape == (B, 0, D)


@every_preset
def test_prefill_and_steps_equal_one_pass(name):
    mixer, x = make(name), tokens(B, T)
    y = mixer(x)
    for split in (3, 13):
        first, state = mixer.prefill(x[:, :split])
        second, _ = mixer.prefill(x[:, split:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), y, **TOLERANCE)
    state, steps = mixer.init_state(B), []
    for t in range(T):
        y_t, state = mixer.step(x[:, t], state)
        steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, 1), y, **TOLERANCE)
    _, whole = mixer.prefill(x)
    flat, expected = (torch.utils._pytree.tree_flatten(s)[0] for s in (state, whole))
    for a, b in zip(flat, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@every_preset
def test_packed_sequences_equal_separate_ones(name):
    mixer, x = make(name), tokens(1, T)
    cu = torch.tensor([0, 9, 10, 21], dtype=torch.int32)
    bounds = list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    y, state = mixer.prefill(x, cu_seqlens=cu)
    again, _ = mixer.prefill(x, state, cu_seqlens=cu)
    for n, (a, b) in enumerate(bounds):
        alone, own = mixer.prefill(x[:, a:b])
        torch.testing.assert_close(y[:, a:b], alone, **TOLERANCE)
        torch.testing.assert_close(again[:, a:b], mixer.prefill(x[:, a:b], own)[0], **TOLERANCE)
        if name not in ("softmax", "softmax_window"):  # whose caches are padded to the longest
            one = state.index_select(torch.tensor([n]))
            for s, t in zip(*(torch.utils._pytree.tree_flatten(s)[0] for s in (one, own)), strict=True):
                torch.testing.assert_close(s, t, **TOLERANCE)


@every_preset
def test_padding_is_never_read(name):
    mixer, x = make(name), tokens(3, T)
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[0, :7] = False  # left
    mask[1, 12:] = False  # right
    mask[2, [0, 4, 5, 11, 20]] = False  # holes
    y, state = mixer.prefill(x, mask=mask)
    assert torch.equal(mixer(x, mask=mask), y) and (y[~mask] == 0).all()
    more = tokens(3, 2)
    decoded = mixer.step(more[:, 0], state)[0]
    for n in range(3):
        alone, own = mixer.prefill(x[n : n + 1, mask[n]])
        torch.testing.assert_close(y[n, mask[n]], alone[0], **TOLERANCE)
        torch.testing.assert_close(decoded[n], mixer.step(more[n : n + 1, 0], own)[0][0], **TOLERANCE)
    torch.testing.assert_close(mixer(x, mask=torch.ones_like(mask)), mixer(x), **TOLERANCE)


@every_preset
def test_causal(name):
    mixer, x = make(name), tokens(B, T)
    changed = x.clone()
    changed[:, 11] += 1
    difference = (mixer(changed) - mixer(x)).abs().amax((0, 2))
    felt = 16 if mixer.spec.read.at == "before" else 12  # with it not before the next mini-batch
    assert (difference[:11] < 1e-10).all() and difference[11] > 1e-8 and (difference[felt : felt + 2] > 1e-8).all()


@every_preset
def test_gradient_reaches_every_parameter(name):
    mixer, x = make(name), tokens(B, T).requires_grad_()
    weight = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (mixer(x) * weight).sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(-1) > 0).all()
    for parameter, p in mixer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, parameter


@every_preset
def test_state_does_not_grow(name):
    mixer = make(name)
    sizes = [mixer.prefill(tokens(B, length))[1].nbytes for length in (10, 20, 40)]
    if name == "softmax":
        assert sizes[0] < sizes[1] < sizes[2]
    else:
        assert sizes[0] == sizes[1] == sizes[2]
        if name != "softmax_window":
            assert mixer.init_state(B).nbytes == sizes[0]


@every_preset
def test_a_call_is_gone_with_its_result(name):
    """What it made of its input does not wait for the garbage collector."""
    mixer, x = make(name), tokens(B, T)
    seen = weakref.ref(x)
    gc.disable()
    try:
        with torch.no_grad():
            mixer(x)
        del x
        assert seen() is None
    finally:
        gc.enable()


@every_preset
def test_init_is_deterministic_and_reset_makes_it_anew(name):
    torch.manual_seed(3)
    one = Mixer(D, name)
    torch.manual_seed(3)
    two = Mixer(D, name)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        for p in one.parameters():
            p.fill_(7.0)
    one.reset_parameters()
    for parameter, p in one.named_parameters():
        assert (p != 7.0).all(), parameter


@every_preset
def test_weight_decay_is_for_matrices(name):
    mixer = Mixer(D, name)
    parameters = dict(mixer.named_parameters())
    spared = mixer.no_weight_decay()
    assert spared <= parameters.keys()
    assert {n for n in parameters if n.endswith("proj.weight")} & spared == set()
    assert all(n in spared for n, p in parameters.items() if p.ndim == 1 or "dt_bias" in n or n.startswith("params."))


@pytest.mark.parametrize("d_model", [64.0, "kda"])
def test_a_width_is_a_whole_number(d_model):
    with pytest.raises(ValueError, match=r"d_model=.*expected a whole number of channels, before the declaration"):
        ttr.Mixer(d_model, "kda")
