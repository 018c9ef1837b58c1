"""The compiled kernels as they are called: sizes beyond 2^31 elements, torch.compile, CUDA graphs."""

import pytest
import torch

import ttr
from ttr.kernels.triton.configs import arch_of, config_for
from ttr.kernels.triton.scalar_gate import run

from ..cuda_graph import captured
from . import direct
from .mechanisms import MECHANISMS, inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: sizes past 2^31, Inductor and CUDA graphs need one")

H, D = 16, 128


def straight(q, k, v, log_decay, weight, initial, name):
    """o and the last state in one segment, nothing kept for backward."""
    rule = direct.rule_of(MECHANISMS[name])
    config = config_for(arch_of(q.device), rule.erase, D, D, q.dtype)
    return run.forward(q, k, v, log_decay, weight, initial, None, 0.1, rule, config, 1, False)[:2]


def large(*lead: int):
    """bf16 q, k, v and float32 gate and step: [*lead, H, D] and [*lead, H]."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(*lead, H, D, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(3))
    k /= D**0.5
    log_decay, weight = (torch.rand(*lead, H, device="cuda", generator=generator) for _ in range(2))
    return q, k, v, log_decay.mul_(-0.1), weight


@pytest.mark.parametrize("name", ["mamba", "gated delta"])
def test_a_batch_beyond_int32(name):
    """The last row begins behind element 2^31 of q, k, v and o."""
    B, T = 9, 131_072 + 65
    assert (B - 1) * T * H * D > 2**31
    tensors = large(B, T)
    o, last = straight(*tensors, None, name)
    alone, last_alone = straight(*(x[-1:].clone() for x in tensors), None, name)
    assert torch.isfinite(alone).all() and alone.abs().max() > 0
    assert torch.equal(o[-1:], alone) and torch.equal(last[-1:], last_alone)


@pytest.mark.parametrize("name", ["mamba", "gated delta"])
def test_a_sequence_beyond_int32(name):
    """Tokens behind element 2^31 of their sequence, against a call on them that starts from the state before them."""
    before, T = 2**20 + 4096, 2**20 + 8192 + 65
    assert before * H * D > 2**31
    tensors = large(1, T)
    o, last = straight(*tensors, None, name)
    state = straight(*(x[:, :before].contiguous() for x in tensors), None, name)[1]
    late, last_late = straight(*(x[:, before:].clone() for x in tensors), state, name)
    assert torch.isfinite(late).all() and late.abs().max() > 0
    assert torch.equal(o[:, before:], late) and torch.equal(last, last_late)


def arguments(name: str, length, dtype=torch.bfloat16):
    case = direct.in_dtype(inputs(name, length, H=2, Hv=4, dk=64, dv=64), dtype, "cuda")
    return dict(case.tensors, initial_state=case.initial_state, cu_seqlens=case.cu_seqlens)


@pytest.mark.parametrize("name", ["mamba", "gated delta", "gated deltaproduct"])
@pytest.mark.parametrize("packed", [False, True])
def test_inductor_compiles_it_whole(name, packed):
    given = arguments(name, [100, 1, 40] if packed else 141)
    leaves = [t for t in given.values() if t is not None and t.is_floating_point()]
    for t in leaves:
        t.requires_grad_()

    def loss():
        o, state = ttr.regress(spec=MECHANISMS[name], path="triton", **given)
        return (o.float() * torch.linspace(0.5, 1.5, o.numel(), device="cuda").view_as(o)).sum() + state.weights["W"].square().sum()

    expected = torch.autograd.grad(loss(), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(), leaves)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)  # inductor fuses what is around the kernels


@pytest.mark.parametrize("name", ["mamba", "gated delta", "nlms", "gated deltaproduct"])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_captured_by_a_cuda_graph(name, packed):
    """Nothing asks the host: not the sequences' bounds either."""
    given = arguments(name, [100, 1, 40] if packed else 141)
    fresh = given["v"].flip(1)
    with torch.no_grad():

        def call():
            o, state = ttr.regress(spec=MECHANISMS[name], path="triton", **given)
            return o, state.weights["W"]

        graph, replayed = captured(call)
        given["v"].copy_(fresh)
        graph.replay()
        for x, y in zip(replayed, call(), strict=True):
            assert torch.equal(x, y)
