"""Compositions as layers: decoding, packing, padding, causality, gradients, state; what their equations imply; refusals."""

from __future__ import annotations

import io

import pytest
import torch

import ttr
from ttr.layers import LM, Block, ComposedLayer, ComposedState, LMState, Mixer

D, B, T = 32, 2, 23
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
MEMORY = {"compose.memory.optimizer.mini_batch": 4, "compose.memory.layer.n_heads": 2}
WINDOW = {"compose.window.regressor.window": 6, "compose.window.layer.n_heads": 4}
SMALL = {
    "lact_layer": {**MEMORY, **WINDOW},
    "titans_mac": {**MEMORY, "compose.segment": 6, "compose.attention.layer.n_heads": 4},
    "titans_mag": {**MEMORY, **WINDOW},
    "titans_mal": {**MEMORY, **WINDOW},
}
every = pytest.mark.parametrize("name", SMALL)


def make(name: str, **more) -> ComposedLayer:
    """In float64, with mini-batches, windows and segments that end inside T tokens, at unlike places."""
    torch.manual_seed(0)
    layer = ttr.layer(D, ttr.declare(name, **{**SMALL[name], **more}), layer_idx=1, n_layers=3).double()
    assert isinstance(layer, ComposedLayer)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def leaves(state) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_flatten(state)[0]


def test_the_list_is_complete():
    assert ttr.compositions() == sorted(SMALL)


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
    with pytest.raises(ValueError, match="made under another declaration"):
        ComposedState.from_dict(data, ttr.declare(name, **{**SMALL[name], "compose.memory.layer.n_heads": 1}))
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


@every
def test_declarations_round_trip(name, tmp_path):
    composition = ttr.declare(name)
    (tmp_path / "copy.yaml").write_text(composition.to_yaml())
    again = [composition.to_dict(), composition.to_dict(full=True), tmp_path / "copy.yaml", {"base": name}, composition]
    for source in again:
        assert ttr.declare(source) == composition and ttr.declare(source).hash == composition.hash
    assert composition.name == name and ttr.declare({"base": name}).name is None
    assert len({ttr.declare(n).hash for n in SMALL}) == len(SMALL)


def test_parts_merge_replace_and_are_found_beside_their_file(tmp_path):
    changed = ttr.declare("titans_mag", **{"compose.memory.layer.head_dim": 32, "compose.window": "softmax", "compose.persistent": 9})
    assert changed.memory == ttr.spec("titans", **{"layer.head_dim": 32}) and changed.window == ttr.spec("softmax")
    assert changed.persistent == 9 and changed != ttr.declare("titans_mag")
    (tmp_path / "mine.yaml").write_text("base: kda\nlayer: {n_heads: 2}\n")
    (tmp_path / "both.yaml").write_text("compose: {kind: parallel, memory: mine.yaml, window: {base: mine.yaml, layer: {head_dim: 32}}}\n")
    both = ttr.declare(tmp_path / "both.yaml")
    assert both.memory == ttr.spec("kda", **{"layer.n_heads": 2}) and both.window.layer.head_dim == 32


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


def test_training_on_sequences_that_never_write_is_warned_of():
    with pytest.warns(UserWarning, match=r"lact: 9 tokens in training.*set optimizer.mini_batch"):
        ttr.layer(D, "lact_layer")(torch.randn(1, 9, D))


def test_diagnose_leaves_compositions_out():
    with pytest.raises(ValueError, match=r"no ttr\.Mixer but parts of compositions"):
        ttr.diagnose(ttr.layer(D, "titans_mag"), torch.randn(1, 5, D))
    lm = LM(13, D, ["kda", "titans_mag"])
    assert list(ttr.diagnose(lm, torch.randint(0, 13, (1, 5)))) == ["blocks.0.mixer"]


PARALLEL = {"kind": "parallel", "memory": "titans", "window": "softmax_window"}
REFUSED = {
    "kind": ({"kind": "paralel"}, "compose.kind='paralel' is not known; choose from ['mac', 'parallel', 'series']. Did you mean 'parallel'?"),
    "no memory": ({"kind": "mac"}, "compose: MAC needs ['memory']"),
    "field": ({**PARALLEL, "persistant": 3}, "compose.persistant=3: Parallel has no such field", "Did you mean 'persistent'?"),
    "part": ({**PARALLEL, "memory": "titan"}, "compose.memory: spec='titan' is not known", "Did you mean 'titans'?"),
    "field of a part": ({**PARALLEL, "memory": {"base": "titans", "layer": {"heads": 3}}}, "compose.memory: layer.heads=3: Layer has no such"),
    "composition in a part": ({**PARALLEL, "memory": "titans_mag"}, "compose.memory: titans_mag composes layers", "one memory is expected"),
    "persistent": ({**PARALLEL, "persistent": -1}, "compose.persistent=-1: expected at least 0"),
    "combine": ({**PARALLEL, "combine": "product"}, "compose.combine='product': expected one of ['gate', 'sum']"),
    "share": ({**PARALLEL, "share": ["q", "o"]}, "compose.share[1]='o': expected one of ['k', 'q', 'v']"),
    "share twice": ({**PARALLEL, "share": ["q", "q"]}, "compose.share=['q', 'q'] names a stream twice"),
    "share shifted": ({**PARALLEL, "memory": "rwkv7", "share": ["k"]}, "compose.share: memory.layer.k says how it is projected"),
    "prefix": ({**PARALLEL, "persistent": 3, "window": {"base": "softmax_window", "regressor": {"prefix": 2}}},
        "compose.window: regressor.prefix=2, but what this window keeps is the 3 vectors"),
    "segment": ({"kind": "mac", "memory": "titans", "segment": 0}, "compose.segment=0: expected at least 1"),
    "mac on mesa": ({"kind": "mac", "memory": "mesanet"}, "compose.memory: mac reads the memory", "regressor 'least_squares' is trained by no"),
    "mac on mlstm": ({"kind": "mac", "memory": "mlstm"}, "compose.memory: mac reads the memory", "read.normalizer='max1'"),
    "mac on ttt": ({"kind": "mac", "memory": "ttt_linear"}, "compose.memory: mac reads the memory", "optimizer.position='learned'"),
    "mac on a window": ({"kind": "mac", "memory": "titans", "attention": "softmax_window"}, "compose.attention", "got 'kernel' with window=512"),
    "mac on no attention": ({"kind": "mac", "memory": "titans", "attention": "kda"}, "compose.attention", "got 'linear' with window=None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_came_and_what_there_is(name):
    compose, *parts = REFUSED[name]
    with pytest.raises(ttr.SpecError) as error:
        ttr.declare({"compose": compose})
    assert all(part in str(error.value) for part in parts), error.value


def test_one_door():
    for wrong in (ttr.spec, lambda source: Mixer(D, source), lambda source: ttr.regress(*[torch.zeros(1, 1, 1, 4)] * 3, source)):
        with pytest.raises(ttr.SpecError, match=r"titans_mac composes layers .*which ttr\.layer\(d_model, \.\.\.\) makes"):
            wrong("titans_mac")
    with pytest.raises(ttr.SpecError, match=r"gate='scalar' stands beside compose.*as compose\.memory\.gate"):
        ttr.declare("titans_mac", gate="scalar")
    with pytest.raises(ttr.SpecError, match=r"spec='titans_mab' is not known.*Did you mean 'titans_ma"):
        ttr.layer(D, "titans_mab")
    with pytest.raises(ValueError, match=r"layer_idx=2: expected 0 <= layer_idx < n_layers=2"):
        ttr.layer(D, "titans_mac", layer_idx=2, n_layers=2)
    with pytest.raises(ttr.SpecError, match=r"memory's heads give 64, window's 32"):
        ttr.layer(D, {"compose": {**PARALLEL, "memory": {"base": "kda", "layer": {"expand_v": 2}}}})
    with pytest.raises(ttr.SpecError, match=r"compose.share: k is projected to 64 channels for memory, to 32 for window"):
        ttr.layer(D, {"compose": {**PARALLEL, "memory": {"base": "kda", "layer": {"expand_k": 2}}, "share": ["k"]}})
    with pytest.raises(ValueError, match=r"x: got shape \[1, 5, 3\], expected \[B, T, 32\]"):
        ttr.layer(D, "titans_mac")(torch.zeros(1, 5, 3))
