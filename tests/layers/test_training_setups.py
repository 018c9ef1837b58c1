"""What training loops wrap around a layer: activation checkpointing, saved-tensor hooks, autocast."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ttr

CHECKPOINT = """
import torch, ttr
from torch.utils.checkpoint import checkpoint
for name in ("gated_deltanet", "kda", "longhorn", "mesanet", "softmax"):
    mixer, x = ttr.Mixer(32, name, head_dim=8), torch.randn(2, 9, 32, requires_grad=True)
    checkpoint(mixer, x, use_reentrant=False).sum().backward()
    got = x.grad.clone(); x.grad = None
    mixer(x).sum().backward()
    assert torch.allclose(got, x.grad), name
"""


def test_checkpointing_the_first_call_of_a_process():
    """In a fresh process, where nothing about a declaration has been worked out before."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHECKPOINT], check=True, timeout=120)


def test_dual_says_what_it_needs_under_saved_tensor_hooks():
    mixer, x = ttr.Mixer(32, "ttt_linear", head_dim=8), torch.randn(1, 9, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        checkpoint(mixer, x, use_reentrant=False)
    checkpoint(mixer, x, use_reentrant=True).sum().backward()
    got, x.grad = x.grad, None
    mixer(x).sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("name", ["gated_deltanet", "kda", "momentum_deltanet", "mesanet", "ttt_mlp", "linear_attention"])
def test_autocast_leaves_the_memory_in_float32(name):
    """The state is float32, and the tile does not change the result beyond the rounding of q, k, v."""
    torch.manual_seed(0)
    mixer, x = ttr.Mixer(32, name, head_dim=8), torch.randn(2, 40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer.prefill(x)
        given = mixer.inputs(x)
        assert all(t.dtype == torch.float32 for t in state.memory.weights.values())
        if ttr.select_path(mixer.spec)[0] == "chunk":
            arguments = {"params": given.params, **given.signals}
            tiles = [
                ttr.regress(given.q, given.k, given.v, mixer.spec, path={"kind": "chunk", "chunk_size": c}, **arguments)[1] for c in (1, 32)
            ]
            for name_, a in tiles[0].weights.items():
                torch.testing.assert_close(a, tiles[1].weights[name_], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ttr.presets())
def test_autocast_leaves_streams_and_output_gates_in_16_bits(name):
    """Learned constants in float32 would widen them, and with them what the kernels compute in; log decays and steps stay in float32."""
    mixer, x, seen = ttr.Mixer(32, name, head_dim=8).eval(), torch.randn(2, 9, 32), {}
    mixer.signals.register_forward_hook(lambda _module, _given, y: seen.update(y))
    mixer.o_proj.register_forward_pre_hook(lambda _module, given: seen.update(o=given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x)
        given = mixer.inputs(x)
    streams = {"q": given.q, "k": given.k, "v": given.v} | ({} if given.write_key is None else {"write_key": given.write_key})
    declared = mixer.spec.signals()
    assert {key for key in seen if seen[key].dtype != torch.float32 and key in declared} == set()
    assert {key: y.dtype for key, y in (seen | streams).items() if key not in declared and y.dtype != torch.bfloat16} == {}


@pytest.mark.parametrize("name", ["ttt_linear", "titans", "gated_deltanet", "mesanet", "softmax"])
def test_inference_mode_gives_the_same_outputs(name):
    """Lightning evaluates under inference mode, where torch.func.grad gives zeros on torch 2.11."""
    torch.manual_seed(0)
    mixer, x = ttr.Mixer(32, name, head_dim=8), torch.randn(2, 20, 32)
    with torch.inference_mode():
        inside, state = mixer.prefill(x[:, :15])
        step, _ = mixer.step(x[:, 15], state)
    torch.testing.assert_close(torch.cat([inside, step[:, None]], 1), mixer(x[:, :16]).detach(), rtol=1e-4, atol=1e-5)
