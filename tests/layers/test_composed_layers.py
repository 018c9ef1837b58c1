"""Compositions as layers: decoding, packing, padding, causality, gradients, state, hybrids, what training wraps around them."""

from __future__ import annotations

import io

import pytest
import torch
from composed import SMALL, TOLERANCE, B, D, T, every, leaves, make, tokens

import ttr
from ttr.layers import LM, Block, ComposedState, LMState, Mixer


@every
@pytest.mark.filterwarnings("ignore:lact")
def test_tensor_in_tensor_out(name):
    layer, x = ttr.layer(D, name), tokens(B, T).float()
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all()
    assert layer(x[:, :1]).shape == (B, 1, D) and layer(x[:, :0]).shape == (B, 0, D)


@every
def test_prefill_and_steps_equal_one_pass(name):
    """Split in the middle of segments and mini-batches, at their ends, and token by token."""
    layer, x = make(name), tokens(B, T)
    y, whole = layer.prefill(x)
    for split in (1, 3, 6, 12, 13, 20):
        first, state = layer.prefill(x[:, :split])
        second, after = layer.prefill(x[:, split:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), y, **TOLERANCE)
        for a, b in zip(leaves(after), leaves(whole), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    state, steps = layer.init_state(B), []
    for t in range(T):
        y_t, state = layer.step(x[:, t], state)
        steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, 1), y, **TOLERANCE)
    for a, b in zip(leaves(state), leaves(whole), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@every
def test_packed_sequences_equal_separate_ones(name):
    layer, x = make(name), tokens(1, T)
    cu = torch.tensor([0, 9, 9, 10, T], dtype=torch.int32)
    y, state = layer.prefill(x, cu_seqlens=cu)
    again, _ = layer.prefill(x, state, cu_seqlens=cu)
    more = tokens(4)
    decoded, _ = layer.step(more, state)
    for n, (a, b) in enumerate([(0, 9), (9, 9), (9, 10), (10, T)]):
        alone, own = layer.prefill(x[:, a:b])
        torch.testing.assert_close(y[:, a:b], alone, **TOLERANCE)
        torch.testing.assert_close(again[:, a:b], layer.prefill(x[:, a:b], own)[0], **TOLERANCE)
        torch.testing.assert_close(decoded[n : n + 1], layer.step(more[n : n + 1], own)[0], **TOLERANCE)


@every
def test_padding_is_never_read(name):
    layer, x = make(name), tokens(3, T)
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[0, :7] = False  # left
    mask[1, 12:] = False  # right
    mask[2, [0, 4, 5, 11, 20]] = False  # holes
    y, state = layer.prefill(x, mask=mask)
    assert torch.equal(layer(x, mask=mask), y) and (y[~mask] == 0).all()
    noisy = torch.where(mask[..., None], x, torch.full_like(x, 1e3))
    torch.testing.assert_close(layer(noisy, mask=mask), y, **TOLERANCE)
    more = tokens(3, 9)
    decoded, _ = layer.prefill(more, state)
    for n in range(3):
        alone, own = layer.prefill(x[n : n + 1, mask[n]])
        torch.testing.assert_close(y[n, mask[n]], alone[0], **TOLERANCE)
        torch.testing.assert_close(decoded[n], layer.prefill(more[n : n + 1], own)[0][0], **TOLERANCE)


@every
def test_causal(name):
    """The future of every token changed, wherever in its segment and mini-batch it stands."""
    layer, x = make(name), tokens(1, T)
    changed = x.repeat(T, 1, 1)
    for t in range(T):
        changed[t, t:] += 1 + tokens(T - t)
    difference = (layer(changed) - layer(x)).abs().amax(2)
    for t in range(T):
        assert (difference[t, :t] < 1e-10).all() and (difference[t, t:] > 1e-8).all(), t


@every
def test_gradient_reaches_every_parameter(name):
    layer, x = make(name), tokens(B, T).requires_grad_()
    weight = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (layer(x) * weight).sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(-1) > 0).all()
    for parameter, p in layer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, parameter


@every
def test_gradient_through_the_state(name):
    layer, x = make(name), tokens(B, T).requires_grad_()
    expected = torch.autograd.grad(layer(x)[:, -1].sum(), x)[0]
    _, state = layer.prefill(x[:, :9])
    got = torch.autograd.grad(layer.prefill(x[:, 9:], state)[0][:, -1].sum(), x)[0]
    torch.testing.assert_close(got, expected, **TOLERANCE)


@every
def test_state_does_not_grow_without_bound(name):
    layer = make(name)
    sizes = [layer.prefill(tokens(B, length))[1].nbytes for length in (24, 48, 96)]
    assert sizes[0] == sizes[1] == sizes[2]


@every
def test_states_are_saved_loaded_and_selected(name):
    layer, x = make(name), tokens(3, 10)
    _, state = layer.prefill(x[:, :9])
    assert isinstance(state, ComposedState) and state.nbytes > 0
    file = io.BytesIO()
    torch.save(state.detach().to_dict(), file)
    file.seek(0)
    data = torch.load(file, weights_only=True)
    expected = layer.step(x[:, 9], state)[0]
    for spec in (layer, layer.spec):
        torch.testing.assert_close(layer.step(x[:, 9], ComposedState.from_dict(data, spec))[0], expected, rtol=0, atol=0)
    flipped = state.index_select(torch.tensor([2, 0]))
    torch.testing.assert_close(layer.step(x[[2, 0], 9], flipped)[0], expected[[2, 0]], **TOLERANCE)
    for other in ({"compose.memory.layer.n_heads": 1}, {"compose.persistent": 1}):
        with pytest.raises(ValueError, match="made under another declaration"):
            ComposedState.from_dict(data, ttr.declare(name, **{**SMALL[name], **other}))
    with pytest.raises(ValueError, match=r"composed state is missing \['parts'\]"):
        ComposedState.from_dict({"spec_hash": ""}, layer)
    with pytest.raises(ValueError, match=r"got MixerState, expected a ttr\.ComposedState"):
        layer.step(x[:, 9], state.parts["memory"])
    with pytest.raises(ValueError, match=r"state: got \[3\] sequences, x has 2"):
        layer.prefill(x[:2], state)


@every
def test_init_is_deterministic_and_reset_makes_it_anew(name):
    torch.manual_seed(3)
    one = ttr.layer(D, name)
    torch.manual_seed(3)
    two = ttr.layer(D, name)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        for p in one.parameters():
            p.fill_(7.0)
    one.reset_parameters()
    for parameter, p in one.named_parameters():
        assert (p != 7.0).all(), parameter


@every
def test_weight_decay_is_for_matrices(name):
    layer = ttr.layer(D, name)
    parameters, spared = dict(layer.named_parameters()), layer.no_weight_decay()
    assert spared <= parameters.keys() and not {n for n in parameters if n.endswith("proj.weight")} & spared
    assert all(n in spared for n, p in parameters.items() if p.ndim == 1 or "params." in n or n == "persistent")


def test_hybrids_of_memories_and_compositions():
    torch.manual_seed(0)
    layers = [ttr.declare(name, **SMALL[name]) for name in SMALL] + ["gated_deltanet"]
    lm, words = LM(13, D, layers, mlp="swiglu").double(), torch.randint(0, 13, (2, 11))
    logits = lm(words)
    first, state = lm.prefill(words[:, :7])
    state = LMState.from_dict(state.detach().to_dict(), lm)
    second, _ = lm.prefill(words[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), logits, **TOLERANCE)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, :3] = False
    padded = lm(torch.cat([torch.full((2, 3), 5), words], 1), mask=mask)
    torch.testing.assert_close(padded[:, 3:], logits, **TOLERANCE)
    assert {f"blocks.{i}.mixer.persistent" for i in (1, 2, 3)} <= lm.no_weight_decay()
    ends = [block.mixer.o_proj.weight.std().item() for block in lm.blocks]
    assert all(end == pytest.approx(0.02 * 10**-0.5, rel=0.1) for end in ends)
    block = Block(D, layers[1]).double()
    y, state = block.prefill(tokens(2, 5))
    assert block.step(tokens(2), state)[0].shape == (2, D) and y.shape == (2, 5, D)
    with torch.device("meta"):
        empty = LM(13, D, layers)
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.isfinite(empty(words)).all()


def test_overrides_and_path():
    layer = ttr.layer(D, "titans_mag", n_heads=4, path="definition")
    assert layer.memory.sizes.heads == layer.window.sizes.heads == 4
    assert layer.memory.path == "definition" and layer.window.path == "auto"
    assert isinstance(ttr.layer(D, "kda", n_heads=2), Mixer)
    assert "titans_mac: mac, d_model=32, persistent=4" in repr(ttr.layer(D, "titans_mac"))


def test_training_on_sequences_that_never_write_is_warned_of():
    with pytest.warns(UserWarning, match=r"lact: 9 tokens in training.*set optimizer.mini_batch"):
        ttr.layer(D, "lact_layer")(torch.randn(1, 9, D))


def test_diagnose_leaves_compositions_out():
    with pytest.raises(ValueError, match=r"no ttr\.Mixer but parts of compositions"):
        ttr.diagnose(ttr.layer(D, "titans_mag"), torch.randn(1, 5, D))
    lm = LM(13, D, ["kda", "titans_mag"])
    assert list(ttr.diagnose(lm, torch.randint(0, 13, (1, 5)))) == ["blocks.0.mixer"]


@every
def test_autocast_leaves_the_memories_in_float32(name):
    layer, x = make(name).float(), tokens(B, T).float()
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, state = layer.prefill(x)
    assert all(t.dtype in (torch.float32, torch.int64) for part in state.parts.values() for t in leaves(part.memory))
    torch.testing.assert_close(z.float(), y, rtol=0.1, atol=0.1)


@every
def test_inference_mode_gives_the_same_outputs(name):
    layer, x = make(name), tokens(B, T)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(y, layer(x).detach(), **TOLERANCE)


@pytest.mark.parametrize("kind", ["parallel", "series"])
def test_compositions_of_compiled_parts_compile_whole(kind):
    memory = {"base": "gated_deltanet", "layer": {"expand_v": 1.0}}
    layer = ttr.layer(D, {"compose": {"kind": kind, "memory": memory, "persistent": 2}}, n_heads=2)
    x = tokens(B, T).float()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
