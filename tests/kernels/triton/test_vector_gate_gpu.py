"""One decay a key channel: the compiled kernels, by the tolerance of test_gpu.py. Compiling dominates: run it with -n 12."""

import zlib
from dataclasses import replace

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.triton import configs
from ttr.kernels.triton.vector_gate import config as configuration

from ..cuda_graph import captured
from .conftest import INTERPRETED
from .direct import in_dtype
from .test_gpu import public, tolerance
from .test_vector_gate import MECHANISMS, SOME, evaluate, inputs

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gla", "kda", "rwkv7"])
@pytest.mark.parametrize("dk", [32, 64, 128])
@pytest.mark.parametrize("dv", [32, 64, 128])
def test_heads_and_gates(name, dtype, dk, dv):
    """All chunks near, and most of them far."""
    with tolerance() as hold:
        for extreme in (False, True):
            hold(inputs(name, 201, B=1, H=1, Hv=2, dk=dk, dv=dv, seed=dk + dv, extreme=extreme), dtype, public)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name, dtype):
    """By the tolerance of test_gpu.py."""
    with tolerance() as hold:
        for length, d in ((333, 64), (147, 128)):
            case = inputs(name, length, B=2, H=2, Hv=4, dk=d, dv=d, seed=zlib.crc32(name.encode()), extreme=d == 64)
            hold(case, dtype, public)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("dk", "dv"), [(128, 128), (64, 96)])
def test_heads_that_fill_the_gpu(name, dk, dv):
    """Scans take all of a head's values in one program; a sequence that ends with a whole chunk, and one that does not."""
    heads = configs.multiprocessors(configs.arch_of(torch.device("cuda")))
    with tolerance() as hold:
        for length, extreme in ((192, False), (201, True)):
            x = inputs(name, length, B=-(-heads // 4), H=2, Hv=4, dk=dk, dv=dv, seed=length, extreme=extreme)
            hold(x, torch.bfloat16, public)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("segments", [1, 3])
def test_segments_and_packed(name, segments):
    with tolerance() as hold:
        for dtype in (torch.bfloat16, torch.float32):
            own = configuration.config_of(dtype, 64, 64, erase=name != "added, weighted", added=name == "rwkv7")
            for lengths in (700, [5, 0, 64, 1, 333, 0, 130, 65, 1]):
                rows = {"B": 1} if isinstance(lengths, int) else {}
                case = inputs(name, lengths, H=1, Hv=2, dk=64, dv=64, seed=7, **rows)
                hold(case, dtype, lambda x, own=own: evaluate(x, own, segments))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("dk", "dv"), [(96, 128), (48, 80), (80, 48), (112, 16), (16, 112), (16, 16)])
def test_head_sizes(name, dk, dv):
    """Small heads are more: in 512 numbers a few large ones decide what the mean error is (0.8 to 1.7 of the ideal run's, by the seed).

    In float32 most chunks are far.
    """
    with tolerance() as hold:
        for dtype, extreme in ((torch.bfloat16, False), (torch.float32, True)):
            case = inputs(name, 201, B=-(-4096 // (dk * dv)), H=1, Hv=2, dk=dk, dv=dv, seed=dk, extreme=extreme)
            hold(case, dtype, public)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_one_gate_throughout(name, dtype):
    with tolerance() as hold:
        case = inputs(name, 150, B=1, H=1, Hv=2, dk=64, dv=64)
        for log_decay in (0.0, -1e-3, -30.0, -100.0, float("-inf")):
            same = torch.full_like(case.tensors["log_decay"], log_decay)
            hold(replace(case, tensors={**case.tensors, "log_decay": same}), dtype, public)


@pytest.mark.parametrize("name", SOME)
def test_two_runs_agree_bitwise(name):
    case = in_dtype(inputs(name, 1000, B=2, H=2, Hv=4, dk=64, dv=64), torch.bfloat16, "cuda")
    first, *others = (public(case) for _ in range(4))
    for other in others:
        for what in first:
            assert torch.equal(first[what], other[what]), what


def test_a_batch_beyond_int32():
    """The last row begins behind element 2^31 of q, k, v and o."""
    B, T, H, D = 9, 131_072 + 65, 16, 128
    assert (B - 1) * T * H * D > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, log_decay = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(4))
    tensors = [q, k / D**0.5, v, log_decay.abs_().mul_(-0.1), torch.rand(B, T, H, device="cuda", generator=generator)]

    def read(q, k, v, log_decay, step):
        o, state = ttr.regress(q, k, v, "kda", log_decay=log_decay, step=step, path="triton")
        return o, state.weights["W"]

    (o, last), (alone, last_alone) = read(*tensors), read(*(x[-1:].clone() for x in tensors))
    assert torch.isfinite(alone).all() and alone.abs().max() > 0
    torch.testing.assert_close(o[-1:], alone, rtol=2e-2, atol=2e-3)  # alone it is cut into segments
    torch.testing.assert_close(last[-1:], last_alone, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["gla", "rwkv7"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_by_inductor_and_captured_by_a_cuda_graph(name, packed):
    """Nothing asks the host: not the sequences' bounds, nor which chunks are far."""
    case = in_dtype(inputs(name, [100, 1, 40] if packed else 141, H=2, Hv=4, dk=64, dv=64), torch.bfloat16, "cuda")
    leaves = {n: t.requires_grad_() for n, t in case.tensors.items()}

    def loss():
        o, state = testing.call(replace(case, tensors=leaves), "triton")
        return o.float().square().sum() + state.weights["W"].square().sum()

    expected = torch.autograd.grad(loss(), list(leaves.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(), list(leaves.values()))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)
    with torch.no_grad():
        graph, (o, _) = captured(lambda: testing.call(case, "triton"))
        leaves["v"].copy_(leaves["v"].flip(1))
        graph.replay()
        assert torch.equal(o, testing.call(case, "triton")[0])
