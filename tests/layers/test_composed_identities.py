"""What the equations of the compositions imply: empty memories, shared streams, vectors given as tokens, reading without learning."""

from __future__ import annotations

import torch
from composed import TOLERANCE, B, D, T, leaves, make, tokens

import ttr
from ttr.layers import Mixer


def test_shared_streams_are_projected_once():
    layer = ttr.layer(D, "lact_layer")
    assert {name for name, _ in layer.named_parameters() if "proj" in name} == {
        "memory.q_proj.weight", "memory.k_proj.weight", "memory.v_proj.weight", "o_proj.weight",
    }  # fmt: skip


EMPTY = {"regressor": "linear", "optimizer": {"kind": "delta", "step": 0.0}}


def test_a_memory_that_learns_nothing_lets_nothing_through():
    """M_0 = 0 and theta = 0: the product gate is shut."""
    for name in ("titans_mag", "titans_mac"):
        layer = ttr.layer(D, {"base": name, "compose": {"memory": {**EMPTY, "objective": "l2"}}}, n_heads=2)
        assert layer(tokens(B, 9).float()).abs().max() == 0
    layer = ttr.layer(D, {"compose": {"kind": "parallel", "memory": EMPTY, "persistent": 3}}, n_heads=2).double()
    x = tokens(B, 9)
    alone, _ = layer.window.heads(torch.cat([layer.persistent.expand(B, -1, -1), x], 1), None, None)
    torch.testing.assert_close(layer(x), layer.o_proj(alone[:, 3:]), **TOLERANCE)


def test_mac_without_a_memory_is_attention_behind_the_persistent_vectors():
    """M = 0, so every h is a row of zeros: a key of logit 0 and value 0 beside P and the segment's own tokens."""
    declared = {
        "compose": {"kind": "mac", "memory": EMPTY, "attention": {"base": "softmax", "layer": {"qk": []}}, "segment": 5, "persistent": 3}
    }
    layer, x = ttr.layer(D, declared, n_heads=2).double(), tokens(B, 13)
    seen = []
    layer.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(x)
    y, a = torch.cat(seen, 1), layer.attention
    for t in range(13):
        rows = torch.cat([layer.persistent.expand(B, -1, -1), x[:, t - t % 5 : t + 1]], 1)
        q, k, v = (p(rows).unflatten(-1, (2, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        e = (torch.einsum("bhd,bihd->bih", q[:, -1], k) * (D / 2) ** -0.5).exp()
        o = torch.einsum("bih,bihd->bhd", e / (e.sum(1, keepdim=True) + t % 5 + 1), v)
        torch.testing.assert_close(y[:, t], a.o_proj(o.flatten(1)), **TOLERANCE)


def test_persistent_vectors_are_tokens_that_came_first():
    """Given as tokens instead: MAG (whose window then keeps a prefix) and MAL are the same."""
    for name in ("titans_mag", "titans_mal"):
        layer, x = make(name), tokens(B, T)
        more = {"compose.persistent": 0} | ({"compose.window.regressor.prefix": 4} if name == "titans_mag" else {})
        plain = make(name, **more)
        plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "persistent"})
        torch.testing.assert_close(plain(torch.cat([layer.persistent.expand(B, -1, -1), x], 1))[:, 4:], layer(x), **TOLERANCE)


def test_parallel_sums_two_mixers():
    declared = {"compose": {"kind": "parallel", "memory": "gated_deltanet", "window": "gla"}}
    layer, x = ttr.layer(D, declared, n_heads=2, expand_v=1.0).double(), tokens(B, 9)
    memory, _ = layer.memory.heads(x, None, None)
    window, _ = layer.window.heads(x, None, None)
    torch.testing.assert_close(layer(x), layer.o_proj(memory + window), **TOLERANCE)


def test_mac_takes_any_memory_that_an_optimizer_trains():
    for memory in ("kda", "deltaproduct", "rwkv7", "longhorn", "lact", {"base": "kda", "optimizer": "averaged"}):
        declared = ttr.declare("titans_mac", **{"compose.memory": memory, "compose.segment": 5})
        layer, x = ttr.layer(D, declared, n_heads=2).double().eval(), tokens(B, 12)
        y = layer(x)
        first, state = layer.prefill(x[:, :7])
        torch.testing.assert_close(torch.cat([first, layer.prefill(x[:, 7:], state)[0]], 1), y, **TOLERANCE)


def test_reading_without_learning():
    """M*(q): the first token read before it is learned, for every token, and nothing in the memory moves."""
    for name in ("kda", "mamba2", "momentum_deltanet", "longhorn"):
        torch.manual_seed(0)
        mixer, x = Mixer(D, ttr.spec(name, read="before"), n_heads=2).double(), tokens(B, 9)
        _, state = mixer.prefill(x)
        more = tokens(B, 6)
        y, after = mixer.recall(more, state)
        assert all(a is b for a, b in zip(leaves(after.memory), leaves(state.memory), strict=True))
        step = state
        for t in range(6):
            y_t, step = mixer.step(more[:, t], step)
            torch.testing.assert_close(y[:, t], y_t, **TOLERANCE)
            step.memory = state.memory
