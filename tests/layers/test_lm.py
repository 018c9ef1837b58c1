"""The language model: hybrids, decoding, packing, initialisation, construction on the meta device."""

from __future__ import annotations

import pytest
import torch

import ttr
from ttr.layers import LM, Block, Mixer

HYBRIDS = [
    ["gated_deltanet", "softmax"] * 2,
    ["mamba2", {"base": "kda", "layer": {"n_heads": 2}}, "softmax_window"],
    ["rwkv7", "mesanet", "linear_attention"],
]


@pytest.mark.parametrize("layers", HYBRIDS)
@pytest.mark.parametrize("mlp", [None, "swiglu"])
def test_hybrids_decode_pack_and_pad(layers, mlp):
    torch.manual_seed(0)
    lm, tokens = LM(13, 32, layers, mlp=mlp).double(), torch.randint(0, 13, (2, 12))
    logits = lm(tokens)
    assert logits.shape == (2, 12, 13) and torch.equal(lm.head(lm.hidden(tokens)), logits)
    first, state = lm.prefill(tokens[:, :7])
    steps = [first]
    for t in range(7, 12):
        out, state = lm.step(tokens[:, t], state)
        steps.append(out[:, None])
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-9, atol=1e-9)
    state, out = lm.init_state(2), None
    for t in range(3):
        out, state = lm.step(tokens[:, t], state)
    torch.testing.assert_close(out, logits[:, 2], rtol=1e-9, atol=1e-9)
    packed = lm(tokens.view(1, 24), cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32))
    torch.testing.assert_close(packed.view(2, 12, 13), logits, rtol=1e-9, atol=1e-9)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[:, :3] = False
    padded = lm(torch.cat([torch.full((2, 3), 5), tokens], 1), mask=mask)
    torch.testing.assert_close(padded[:, 3:], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ttr.presets())
def test_meta_device_then_reset(name):
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = LM(13, 32, [name, name], mlp="swiglu")
    assert all(p.is_meta for p in lm.parameters())
    lm.to_empty(device="cpu")
    with torch.no_grad():
        for p in lm.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(1)
    lm.reset_parameters()
    other = LM(13, 32, [name, name], mlp="swiglu")
    torch.manual_seed(1)
    other.reset_parameters()
    for (parameter, p), q in zip(lm.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), parameter
    assert lm.head.weight is lm.embedding.weight


def test_initialisation():
    torch.manual_seed(0)
    lm = LM(512, 64, ["gated_deltanet"] * 4, mlp="swiglu")
    block = lm.blocks[1]
    assert lm.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for last in (block.mixer.o_proj, block.mlp.down):
        assert last.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    plain = LM(512, 64, ["gated_deltanet"], init_std=None)
    assert plain.blocks[0].mixer.q_proj.weight.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.05)


def test_tied_or_not():
    tied, free = LM(50, 32, ["gla"]), LM(50, 32, ["gla"], tie_embeddings=False)
    assert "head.weight" in dict(free.named_parameters()) and "head.weight" not in dict(tied.named_parameters())
    assert tied.head.weight is tied.embedding.weight and free.head.weight is not free.embedding.weight


def test_weight_decay_is_for_matrices():
    lm = LM(50, 32, ["rwkv7", "mesanet"], mlp="swiglu")
    names, spared = dict(lm.named_parameters()), lm.no_weight_decay()
    assert spared <= names.keys()
    decayed = names.keys() - spared
    assert {"embedding.weight", "blocks.0.mixer.q_proj.weight", "blocks.1.mlp.down.weight"} <= decayed
    assert all(names[n].ndim == 2 for n in decayed)
    assert {"norm.weight", "blocks.0.mixer_norm.weight", "blocks.1.mixer.params.ridge"} <= spared
    assert any("bias" in n for n in spared) and not any("bias" in n for n in decayed)


def test_layer_overrides_reach_every_mixer():
    lm = LM(50, 64, ["gated_deltanet", "softmax"], n_heads=4)
    assert [b.mixer.sizes.heads for b in lm.blocks] == [4, 4]
    assert [b.mixer.layer_idx for b in lm.blocks] == [0, 1] and lm.blocks[0].mixer.n_layers == 2


def test_block():
    torch.manual_seed(0)
    block, x = Block(32, "deltanet", layer_idx=2, n_layers=3), torch.randn(2, 5, 32)
    inner = x + block.mixer(block.mixer_norm(x))
    assert torch.allclose(block(x), inner + block.mlp(block.mlp_norm(inner)))
    first, state = block.prefill(x[:, :4])
    last, _ = block.step(x[:, 4], state)
    assert torch.allclose(torch.cat([first, last[:, None]], 1), block(x), atol=1e-5)
    with pytest.raises(ValueError, match="mlp='relu'"):
        Block(32, "deltanet", mlp="relu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LM(10, 32, "deltanet"), "expected a sequence of specs"),
        (lambda: LM(10, 32, []), "expected a sequence of specs"),
        (lambda: LM(10, 32, 4), "layers=4: expected a sequence of specs"),
        (lambda: LM(10, 32, ["deltanet"])(torch.randn(2, 3)), "expected int64 [B, T]"),
        (lambda: LM(10, 32, ["deltanet"])(torch.tensor([[3, 10]])), "tokens: got 3 to 10, expected 0 to 9"),
        (lambda: LM(10, 32, ["deltanet"]).step(torch.zeros(2, 1).long(), None), "expected int64 [B]"),  # type: ignore[arg-type]
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_model_learns():
    torch.manual_seed(0)
    lm = LM(17, 32, ["gated_deltanet", "softmax"], mlp="swiglu", n_heads=2)
    tokens = torch.randint(0, 17, (8, 12))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(lm(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_low_precision_runs():
    torch.manual_seed(0)
    lm, tokens = LM(13, 32, ["kda", "mlstm"]), torch.randint(0, 13, (2, 20))
    expected = lm(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = lm(tokens)
    assert torch.isfinite(logits).all() and (logits - expected).abs().max() < 0.05 * expected.abs().max()
    half = lm.bfloat16()(tokens)
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    assert isinstance(lm.blocks[0].mixer, Mixer)
