"""A Mixer inside somebody else's model: nanoGPT's block and weight-init hook, deepcopy, state dicts, compile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import ttr
from ttr.layers import Mixer


class NanoBlock(nn.Module):
    """nanoGPT's block, its attention replaced."""

    def __init__(self, name: str, d: int = 64):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        spec = ttr.spec(name)
        self.attn = Mixer(d, ttr.spec(spec, **{"optimizer.mini_batch": 4}) if spec.mini_batch != 1 else spec)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def nanogpt_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)


@pytest.mark.parametrize("name", ttr.presets())
def test_survives_nanogpt(name):
    torch.manual_seed(0)
    block = NanoBlock(name)
    matrices = {f"{n}.weight" for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    before = {n: p.clone() for n, p in block.attn.named_parameters() if f"attn.{n}" not in matrices}
    block.apply(nanogpt_init)
    after = dict(block.attn.named_parameters())
    for parameter, p in before.items():
        assert torch.equal(after[parameter], p), parameter
    assert not any(m.bias is not None for m in block.attn.modules() if isinstance(m, nn.Linear))
    assert after["o_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    x = torch.randn(2, 9, 64, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape == x.shape and torch.isfinite(y).all() and all(p.grad is not None for p in block.parameters())


def test_training_on_sequences_that_never_write_is_warned_of():
    mixer = Mixer(32, "lact")
    with pytest.warns(UserWarning, match=r"lact: 2048 tokens in training.*set optimizer.mini_batch"):
        mixer(torch.randn(1, 2048, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer.eval()(torch.randn(1, 9, 32))
        Mixer(32, ttr.spec("lact", **{"optimizer.mini_batch": 8}))(torch.randn(1, 9, 32))


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7", "ttt_mlp"])
def test_copies_and_state_dicts(name):
    torch.manual_seed(0)
    mixer, x = Mixer(32, name), torch.randn(1, 5, 32)
    assert torch.equal(copy.deepcopy(mixer)(x), mixer(x))
    other = Mixer(32, name)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x), mixer(x))
    assert {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"} <= mixer.state_dict().keys()
