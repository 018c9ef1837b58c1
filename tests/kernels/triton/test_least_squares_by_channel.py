"""Least squares with a decay a key channel: what of it has kernels of its own, beside what `test_least_squares` asks of both."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.triton.least_squares_by_channel import plan, run
from ttr.kernels.triton.vector_gate.config import Choice

from ..cuda_graph import captured
from .conftest import INTERPRETED
from .direct import in_dtype, poisoned
from .test_least_squares import BOUNDS, BY_CHANNEL, MECHANISMS, check, declare
from .test_vector_gate import config

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own

READS = pytest.mark.parametrize("read", ["after", "before"])


def decayed(case: testing.Inputs, log_decay: torch.Tensor | float) -> testing.Inputs:
    """The case with these log decays, [dk], at every token."""
    given = case.tensors["log_decay"]
    return replace(case, tensors={**case.tensors, "log_decay": torch.zeros_like(given) + log_decay})


@contextmanager
def solving(**options):
    """With these of `plan.options`; `vector_gate` in chunks as long."""
    own = plan.options
    chunk = Choice(config(options["chunk"]), 1, 0) if "chunk" in options else None
    with (
        mock.patch.object(plan, "options", lambda *x: own(*x)._replace(**options)),
        mock.patch.object(run, "choose", (lambda *_: chunk) if chunk else run.choose),
    ):
        yield


def far_chunks(case: testing.Inputs) -> list[int]:
    """Of the first head, the rounds of every chunk."""
    x = case.tensors
    kind = plan.kind_of(x["k"], x["v"], x["log_decay"], x["weight"], None, None, False)
    given, _ = run.statistics(plan.plan(kind), x["k"], x["log_decay"], x["weight"], None, None, False)
    return given.made["far"][:, 0].tolist()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("strongest", "rounds"), [(-1.0, 0), (-2.5, 2), (-5.0, 3), (-8.0, 4), (-16.0, 5), (-30.0, 6)])
@READS
def test_rounds(read, strongest, rounds):
    """Pairs that meet in the middle of a chunk, in the middles of its blocks and between them: as many rounds as the gate wants."""
    case = testing.random_inputs(declare("vector", read=read), T=32 + 22, B=1, H=1, Hv=1, dk=16, dv=16)  # ends before a block's middle
    case = decayed(case, torch.linspace(0.0, strongest, 16, dtype=torch.float64))
    assert far_chunks(in_dtype(case, torch.float32))[0] == rounds
    check(case)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("strongest", "rounds"), [(-0.25, 0), (-0.6, 3), (-1.0, 3), (-2.0, 4), (-4.0, 5), (-8.0, 6), (-16.0, 7)])
def test_rounds_in_half(strongest, rounds):
    case = testing.random_inputs(BY_CHANNEL, T=64 + 22, B=1, H=1, Hv=1, dk=16, dv=16)
    case = decayed(case, torch.linspace(0.0, strongest, 16, dtype=torch.float64))
    assert far_chunks(in_dtype(case, torch.float16))[0] == rounds
    check(case, 5e-3, torch.float16)


@pytest.mark.usefixtures("interpreter")
def test_one_strong_channel_among_weak_ones():
    case = testing.random_inputs(BY_CHANNEL, T=40, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False)
    case.tensors["log_decay"][..., 3] = -60.0
    case.tensors["log_decay"][:, 20:, :, 5] = float("-inf")
    check(case)


@pytest.mark.usefixtures("interpreter")
def test_correlated_keys():
    case = testing.random_inputs(declare("vector", iterations=9), T=70, B=1, H=1, Hv=1, dk=32, dv=16, correlation=0.95)
    check(decayed(case, -1e-3), 1e-4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("extreme", [False, True])
@READS
def test_segments(read, extreme):
    """The scans of few heads cut into pieces, with an H before them: with more chunks than the public call would make of so few tokens."""
    case = testing.random_inputs(declare("vector", read=read, iterations=3), T=16 * 16 + 8, B=1, H=1, Hv=1, dk=16, dv=16, extreme=extreme)
    case = in_dtype(case, torch.float32)
    x, splits = case.tokens(3, 16 * 16 + 8).tensors, (3,)
    with solving(chunk=16, tile=16), poisoned():
        kind = plan.kind_of(x["k"], x["v"], x["log_decay"], x["weight"], None, None, False)
        assert plan.plan(kind).segments == 2
        got = testing.evaluate(case, "triton", splits=splits)
    testing.assert_close(got, testing.evaluate(case.to(torch.float64), "chunk", splits=splits), 2e-5, "in two segments")


@pytest.mark.usefixtures("interpreter")
@READS
def test_packed_sequences_that_go_on(read):
    """A state for each, and gradients of both states, that of the last H not symmetric."""
    case = testing.random_inputs(declare("vector", read=read, iterations=3), T=40, B=3, H=1, Hv=2, dk=16, dv=16)
    case = in_dtype(testing.pack(case, [33, 5, 40]), torch.float32)
    root, G, weights = torch.randn(3, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))

    def run(path, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (root, G, *case.tensors.values(), *case.params.values())]
        start, first_G, *rest = leaves
        state = ttr.State(weights={"G": first_G, "H": start @ start.mT}, spec_hash=case.spec.hash)
        tensors, params = dict(zip(case.tensors, rest, strict=False)), dict(zip(case.params, rest[-len(case.params) :], strict=True))
        o, last = testing.call(replace(case, tensors=tensors, params=params, initial_state=state), path)
        loss = o.square().sum() + (last.weights["H"] * weights.to(dtype)).sum() + last.weights["G"].square().sum()
        return o, *last.weights.values(), *torch.autograd.grad(loss, leaves)

    with poisoned():
        got = run("triton", torch.float32)
    assert max(map(testing.relative_error, got, run("chunk", torch.float64))) < 2e-5


@pytest.mark.usefixtures("interpreter")
def test_a_decay_for_all_tokens():
    """[Hv, dk]: the same numbers at every token, and the sum of their gradients."""
    case = in_dtype(testing.random_inputs(BY_CHANNEL, T=37, B=2, H=1, Hv=2, dk=16, dv=16), torch.float32)
    x, ridge = case.tensors, torch.ones(2, 16)
    form, found = (1.0, 5, 0.0, False), []
    for shape in ((2, 16), (2, 37, 2, 16)):
        decay = torch.linspace(-2, 0, 32).view(2, 16).requires_grad_()
        given = x["q"], x["k"], x["v"], decay.expand(shape).contiguous(), x["weight"], ridge, None, None, None
        with poisoned():
            o, _, last_H = ttr.kernels.triton.least_squares.op.least_squares(*given, *form)
        found.append((o, last_H, *torch.autograd.grad(o.square().sum() + last_H.square().sum(), decay)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_launch_is_for_the_same_arguments_to_be_none():
    p = plan.plan(plan.kind_of(*[torch.empty(1, 16, 2, 16)] * 3, None, None, None, False))
    assert p.solve(2, False, False, False) is not p.solve(2, True, False, False) and p.solve(2, False, True, True) is p.solve(
        2, False, True, True
    )
    assert p.statistics(False, True) is not p.statistics(False, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dk", [16, 48, 64, 128, 256])
def test_no_tile_of_16_bits_is_narrower_than_64(dtype, dk):
    """Of channels; where states are joined, all is in float32."""
    q, decay = torch.empty(1, 65536, 1, dk, dtype=dtype, device="meta"), torch.empty(1, 65536, 1, dk, device="meta")
    p = plan.Plan(plan.kind_of(q, q, decay, None, None, None, False)._replace(arch="sm_90"))
    p.prepare(), p.solve(1, False, False, False), p.solve(1, False, True, False)
    for bind in (p.statistics, p.reverse):
        bind(False, False), bind(True, False)
    assert len(p.bound) == 7
    assert all(bound.constants.get(n, 64) >= 64 for bound in p.bound.values() for n in ("BK", "TILE", "C"))


gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")


@gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 128), (128, 64), (96, 128), (32, 48), (256, 128), (128, 256)])
@pytest.mark.parametrize("name", ["by channel, mesanet", "by channel, read before"])
def test_on_the_gpu(name, dk, dv, dtype):
    """Chunks that are near, and chunks that are far."""
    if dk > 128 and dtype == torch.float32:
        pytest.skip("refused, see test_least_squares")
    for extreme in (False, True):
        case = testing.random_inputs(MECHANISMS[name], T=333, B=2, H=2, Hv=4, dk=dk, dv=dv, extreme=extreme, correlation=0.2)
        check(case, BOUNDS[dtype], dtype, "cuda")


@gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -0.3, -1.0, -3.0, -8.0, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout_on_the_gpu(log_decay, dtype):
    case = testing.random_inputs(BY_CHANNEL, T=150, B=1, H=2, Hv=2, dk=128, dv=128, correlation=0.2)
    check(decayed(case, log_decay), BOUNDS[dtype], dtype, "cuda")


@gpu
@pytest.mark.parametrize("strongest", [-0.25, -0.6, -1.0, -2.0, -4.0, -8.0, -16.0])
@READS
def test_rounds_on_the_gpu(read, strongest):
    case = testing.random_inputs(declare("vector", read=read), T=150, B=1, H=1, Hv=2, dk=64, dv=64, correlation=0.2)
    check(decayed(case, torch.linspace(0.0, strongest, 64, dtype=torch.float64)), BOUNDS[torch.bfloat16], torch.bfloat16, "cuda")


@gpu
@pytest.mark.parametrize("lengths", [(5, 0, 64, 1, 333, 130), (2000,)], ids=str)
def test_packed_on_the_gpu(lengths):
    """Few heads and many tokens: the scans are cut."""
    case = testing.random_inputs(BY_CHANNEL, T=max(lengths), B=len(lengths), H=1, Hv=2, dk=64, dv=64, extreme=False, correlation=0.2)
    check(testing.pack(case, lengths), BOUNDS[torch.bfloat16], torch.bfloat16, "cuda")


@gpu
def test_a_sequence_in_pieces_on_the_gpu():
    case = testing.random_inputs(BY_CHANNEL, T=333, B=1, H=1, Hv=2, dk=64, dv=64, extreme=False, correlation=0.2)
    check(case, BOUNDS[torch.bfloat16], torch.bfloat16, "cuda", splits=(100,))


@gpu
@pytest.mark.parametrize("extreme", [False, True])
def test_bitwise_the_same_from_run_to_run(extreme):
    case = testing.random_inputs(BY_CHANNEL, T=256, B=8, H=4, Hv=4, dk=128, dv=128, extreme=extreme)
    case = in_dtype(case, torch.bfloat16, "cuda")
    first, second = (testing.evaluate(case, "triton") for _ in range(2))
    assert all(torch.equal(x, first[name]) for name, x in second.items())


@gpu
@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_captured_by_a_cuda_graph(packed):
    case = testing.random_inputs(BY_CHANNEL, T=141, B=2, H=2, Hv=2, dk=64, dv=64, extreme=False)
    case = in_dtype(testing.pack(case, (100, 41)) if packed else case, torch.bfloat16, "cuda")
    fresh = case.tensors["q"].flip(1)
    with torch.no_grad():
        graph, (o, _) = captured(lambda: testing.call(case, "triton"))
        case.tensors["q"].copy_(fresh)
        graph.replay()
        assert torch.equal(o, testing.call(case, "triton")[0])
