"""States of layers and models: saved, restored, split by batch, differentiated through."""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils import _pytree as pytree

import ttr
from ttr.layers import LM, LMState, Mixer, MixerState

NAMES = ["gated_deltanet", "rwkv7", "ttt_linear", "mesanet", "softmax", "linear_attention", "momentum_deltanet"]


def saved_and_loaded(data):
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_restore(name):
    torch.manual_seed(0)
    mixer, x = Mixer(32, name).double(), torch.randn(3, 7, 32, dtype=torch.float64)
    _, state = mixer.prefill(x[:, :5])
    state = state.detach()
    loaded = MixerState.from_dict(saved_and_loaded(state.to_dict()), mixer)
    assert torch.equal(mixer.prefill(x[:, 5:], loaded)[0], mixer.prefill(x[:, 5:], state)[0])
    assert MixerState.from_dict(state.to_dict(), mixer.spec).nbytes == state.nbytes > 0
    with pytest.raises(ValueError, match="another declaration"):
        MixerState.from_dict(state.to_dict(), "gla")
    with pytest.raises(ValueError, match=r"missing \['memory'\]"):
        MixerState.from_dict({k: v for k, v in state.to_dict().items() if k != "memory"}, mixer)


def test_a_state_of_another_declaration_is_refused_before_anything_is_computed():
    """Whether or not its convolutions fit, and saved from training without its graph."""
    x = torch.randn(2, 3, 64)
    state = Mixer(64, "gated_deltanet", n_heads=2).prefill(x)[1]
    for call in (lambda mixer: mixer.step(x[:, 0], state), lambda mixer: mixer.prefill(x, state)):
        with pytest.raises(ValueError, match="state was made under another declaration"):
            call(Mixer(64, "deltanet", n_heads=2))
    assert not any(t.requires_grad for t in pytree.tree_leaves(state.to_dict()) if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_select_reorders_sequences(name):
    torch.manual_seed(0)
    mixer, x = Mixer(32, name).double(), torch.randn(3, 7, 32, dtype=torch.float64)
    _, state = mixer.prefill(x[:, :5])
    order = torch.tensor([2, 0, 2])
    y, _ = mixer.prefill(x[order, 5:], state.index_select(order))
    assert torch.allclose(y, mixer(x)[order, 5:], atol=1e-10)


def test_tree_methods():
    mixer = Mixer(32, "rwkv7")
    _, state = mixer.prefill(torch.randn(2, 5, 32))
    leaves, structure = pytree.tree_flatten(state)
    assert all(isinstance(t, torch.Tensor) for t in leaves) and any(t.requires_grad for t in leaves)
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, MixerState) and again.memory.spec_hash == state.memory.spec_hash
    assert not any(t.requires_grad for t in pytree.tree_leaves(state.detach()))
    assert all(a is not b and torch.equal(a, b) for a, b in zip(pytree.tree_leaves(state.clone()), leaves, strict=True))
    assert state.to("cpu").nbytes == sum(t.numel() * t.element_size() for t in leaves)
    assert set(state.shift) == {"x"} and state.conv == {} and state.position == {}


def test_gradients_flow_through_a_state():
    torch.manual_seed(0)
    mixer, x = Mixer(32, "gated_deltanet").double(), torch.randn(1, 9, 32, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(mixer(x)[:, 5:].square().sum(), x)
    _, state = mixer.prefill(x[:, :5])
    (split,) = torch.autograd.grad(mixer.prefill(x[:, 5:], state)[0].square().sum(), x)
    assert torch.allclose(whole, split, atol=1e-10)


def test_padding_that_decodes_goes_on_where_each_sequence_ended():
    torch.manual_seed(0)
    mixer = Mixer(32, "retnet").double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [False] * 4 + [True] * 2])
    _, state = mixer.prefill(x, mask=mask)
    assert state.position["tokens"].tolist() == [6, 2]
    y, state = mixer.prefill(x[:, :3], state, mask=mask[:, 3:])
    assert state.position["tokens"].tolist() == [9, 4]
    alone = mixer(torch.cat([x[1:, 4:], x[1:, 1:3]], 1))
    assert torch.allclose(y[1:, 1:], alone[:, 2:], atol=1e-10)


def test_model_state():
    torch.manual_seed(0)
    lm = LM(11, 32, ["gated_deltanet", "softmax"])
    _, state = lm.prefill(torch.randint(0, 11, (2, 5)))
    loaded = LMState.from_dict(saved_and_loaded(state.detach().to_dict()), lm)
    assert isinstance(loaded, LMState) and loaded.nbytes == state.nbytes
    token = torch.randint(0, 11, (2,))
    assert torch.equal(lm.step(token, loaded)[0], lm.step(token, state)[0])
    assert [s.name for s in lm.specs] == ["gated_deltanet", "softmax"]
    with pytest.raises(ValueError, match="got 2 layers, expected 1"):
        LMState.from_dict(state.to_dict(), [ttr.spec("softmax")])
    leaves, structure = pytree.tree_flatten(state)
    assert pytree.tree_unflatten(leaves, structure).index_select(torch.tensor([1])).nbytes * 2 == state.nbytes


def test_arguments_of_a_layer_that_do_not_fit_are_named():
    mixer, x = ttr.Mixer(32, "gated_deltanet"), torch.randn(2, 3, 32)
    state = mixer.init_state(2)
    wrong = {
        r"x: got torch\.bfloat16, expected torch\.float32 as the layer's parameters": lambda: mixer(x.bfloat16()),
        r"x: got list, expected a tensor \[B, T, 32\]": lambda: mixer([x]),
        r"x_t: got MixerState, expected a tensor \[B, 32\]": lambda: mixer.step(state, x[:, 0]),
        r"x_t: got torch\.float64, expected torch\.float32": lambda: mixer.step(x[:, 0].double(), state),
        r"state: got \[2\] sequences, x has 1": lambda: mixer.step(x[:1, 0], state),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x.bfloat16()).isfinite().all()
