"""The operators under everything that wraps a layer: autograd, torch.compile, torch.export, checkpointing, transforms."""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import ttr
from ttr import testing
from ttr.kernels.triton import configs
from ttr.kernels.triton.scalar_gate import op

from . import direct

D = 16
GATED = ttr.spec({"optimizer": "delta", "gate": "scalar"})
ADD = ttr.spec({"optimizer": "sgd"})
pytestmark = pytest.mark.usefixtures("interpreter")


def call_of(spec=GATED, **sizes) -> testing.Inputs:
    return testing.random_inputs(spec, **({"T": 21, "dk": D, "dv": D, "extreme": False} | sizes)).to(torch.float32)


def leaves(case: testing.Inputs) -> dict[str, Tensor]:
    given = dict(case.tensors) | ({"initial_state": case.initial_state} if case.initial_state is not None else {})
    return {name: x.detach().clone().requires_grad_() for name, x in given.items()}


def loss(out) -> Tensor:
    o, state = out
    return (o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() + state.weights["W"].square().sum()


def gradients(run, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(given, torch.autograd.grad(loss(run(**given)), list(given.values())), strict=True))


def run_of(spec=GATED, path="triton", **fixed):
    return lambda q, k, v, **rest: ttr.regress(q, k, v, spec, path=path, **rest, **fixed)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 0.0) -> None:
    assert {
        name: testing.relative_error(got[name], x) for name, x in expected.items() if testing.relative_error(got[name], x) > bound
    } == {}


def raw(spec=GATED, T=21, save=True, packed=False, started=True) -> tuple:
    """Arguments of the forward operator."""
    case = call_of(spec, T=T, B=1 if packed else 2)
    tensors, erase = case.tensors, spec.objective.kind == "l2"
    cu_seqlens = torch.tensor([0, 5, 5, T], dtype=torch.int32) if packed else None
    start = torch.randn(3 if packed else 2, 2, D, D) if started else None
    return (
        tensors["q"], tensors["k"], tensors["v"], tensors.get("log_decay"), tensors.get("step"), start, cu_seqlens,
        0.3, erase, False, False, save, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "T", "save", "packed"),
    [(GATED, 21, True, False), (GATED, 257, True, False), (GATED, 40, True, True), (ADD, 21, False, False), (ADD, 40, True, True)],
)
def test_opcheck(spec, T, save, packed):
    """Schema, fake kernels (the same shapes with and without a split of the sequence), symbolic sizes, no hidden mutation."""
    split = T == 257
    arguments = raw(spec, T, save, packed, started=not split)
    if split:
        arguments = tuple(x[:1, :, :1] if isinstance(x, Tensor) else x for x in arguments)
    check = partial(library.opcheck, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
    with direct.poisoned():  # what nobody writes of a buffer is the same every time, as it is compared, too
        check(torch.ops.ttr.scalar_gate_forward.default, arguments)
        if save:
            o, last, saved = torch.ops.ttr.scalar_gate_forward.default(*arguments)
            if split:
                q = arguments[0]
                assert configs.choose(configs.arch_of(q.device), spec is GATED, D, D, q.dtype, 1, T).segments == 2
            check(torch.ops.ttr.scalar_gate_backward.default, (o, last, *arguments[:7], saved, *arguments[7:11], True))


def test_fake_kernels_of_a_gpu_need_none():
    """What torch.compile sees on a GPU machine, here without one: bf16, many heads, nothing to be cut."""
    with FakeTensorMode():
        q, v = (torch.empty(8, 2048, H, 128, dtype=torch.bfloat16, device="cuda") for H in (16, 32))
        step = torch.empty(8, 2048, 32, device="cuda")
        o, state = ttr.regress(q, q, v, "gated_deltanet", step=step, log_decay=step)
        assert o.shape == v.shape and o.device == v.device and o.dtype == v.dtype and state.weights["W"].shape == (8, 32, 128, 128)
        o, _, saved = torch.ops.ttr.scalar_gate_forward.default(q, q, v, step, step, None, None, 1.0, True, False, False, True, True)
        chunk = configs.config_for("sm_90", True, 128, 128, q.dtype).chunk
        kept = v.numel() + 2 * 8 * 2048 * 32 * chunk  # the errors, two matrices a chunk, and the states of some chunks
        assert saved.dtype == torch.uint8 and 1 < saved.numel() / (kept * q.itemsize) < 1.5
        got = torch.ops.ttr.scalar_gate_backward.default(o, None, q, q, v, step, step, None, None, saved, 1.0, True, False, False, True)
        assert [x.shape for x in got] == [x.shape for x in (q, q, v, step, step)]


def test_nothing_is_kept_where_nothing_requires_a_gradient(monkeypatch):
    """save=False under no_grad, inference_mode, and for tensors without requires_grad."""
    seen = []
    forward = op.forward

    def spy(*args):
        seen.append(args[-2])  # save
        return forward(*args)

    monkeypatch.setattr(op, "forward", spy)
    given, run = leaves(call_of()), run_of()
    with torch.no_grad():
        run(**given)
    with torch.inference_mode():
        o, _ = run(**given)
    run(**{name: x.detach() for name, x in given.items()})
    assert seen == [False] * 3
    assert run(**given)[0].requires_grad and seen[-1]
    assert torch.equal(o, run(**given)[0])


@pytest.mark.parametrize("which", ["o", "state"])
def test_one_output_alone(which):
    """A gradient that nobody gives is nobody's zeros: o without the state and the other way round."""
    given = leaves(call_of())

    def used(path):
        o, state = run_of(path=path)(**given)
        return torch.autograd.grad((o if which == "o" else state.weights["W"]).square().sum(), list(given.values()), allow_unused=True)

    for name, got, expected in zip(given, used("triton"), used("chunk"), strict=True):
        expected = torch.zeros_like(given[name]) if expected is None else expected
        assert testing.relative_error(torch.zeros_like(given[name]) if got is None else got, expected) < 1e-5, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "grad"), [("gated_deltanet", True), ("retnet", False), ("mlstm", True)])
def test_compile_fullgraph_with_dynamic_length(name, grad):
    """One graph for every length (from where a chunk pays), the same numbers as eagerly."""
    spec = ttr.spec(name)
    compiled = torch.compile(run_of(spec), fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for T in (21, 33, 16, 50):
        case = call_of(spec, T=T)
        given = leaves(case) if grad else {name: x.detach() for name, x in leaves(case).items()}
        if grad:
            assert_same(gradients(compiled, given), gradients(run_of(spec), given), 1e-6)
        else:
            assert torch.equal(compiled(**given)[0], run_of(spec)(**given)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_call_may_be_cut_into_segments_later():
    """Whether a sequence is split follows from its length without a graph of its own."""
    compiled = torch.compile(run_of(), fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for T in (40, 257, 20):
        given = leaves(call_of(B=1, Hv=2, T=T))
        assert_same(gradients(compiled, given), gradients(run_of(), given), 1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")
def test_compile_packed_sequences():
    compiled = torch.compile(run_of(), fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for lengths in ((9, 12, 3), (20, 1, 17), (5, 30, 11)):
        case = testing.pack(call_of(T=30, B=3), lengths)
        given, packed = leaves(case), {"cu_seqlens": case.cu_seqlens}
        assert_same(gradients(partial(compiled, **packed), given), gradients(run_of(**packed), given), 1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(RuntimeError, match="cu_seqlens: expected 0 = c_0"):
        compiled(**given, cu_seqlens=case.cu_seqlens + 1)


@pytest.mark.filterwarnings("ignore")
def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, step, log_decay):
            o, state = ttr.regress(q, k, v, GATED, step=step, log_decay=log_decay, path="triton")
            return o, state.weights["W"]

    names = ("q", "k", "v", "step", "log_decay")
    arguments = tuple(call_of(T=21).tensors[name] for name in names)
    T = torch.export.Dim("T", min=8, max=4096)
    for strict in (True, False):
        program = torch.export.export(Layer(), arguments, dynamic_shapes=tuple({1: T} for _ in names), strict=strict)
        assert any("scalar_gate_forward" in str(node.target) for node in program.graph.nodes)
        other = tuple(call_of(T=50, seed=1).tensors[name] for name in names)
        for got, expected in zip(program.module()(*other), Layer()(*other), strict=True):
            assert torch.equal(got, expected)


def test_a_second_derivative_is_refused():
    given = leaves(call_of())
    (first,) = torch.autograd.grad(run_of()(**given)[0].sum(), given["v"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"path='triton' has no second derivative; use path='chunk'"):
        first.sum().backward()


def test_transforms_are_right_or_refused():
    given = leaves(call_of())
    q, rest = given.pop("q").detach(), {name: x.detach() for name, x in given.items()}

    def f(q: Tensor) -> Tensor:
        return run_of()(q, **rest)[0].sum()

    (expected,) = torch.autograd.grad(f(q.requires_grad_()), q)
    torch.testing.assert_close(torch.func.grad(f)(q.detach()), expected)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda q: torch.func.grad(f)(q).sum())(q.detach())
    with pytest.raises(Exception, match="vmap"):
        torch.func.vmap(torch.func.grad(f))(q.detach()[None])
    with pytest.raises(Exception, match="jvp"):
        torch.func.jvp(f, (q.detach(),), (torch.ones_like(q),))


def test_activation_checkpointing_and_saved_tensor_hooks():
    given = leaves(call_of())
    expected = gradients(run_of(), given)
    for reentrant in (False, True):
        out = checkpoint(lambda *xs: run_of()(**dict(zip(given, xs, strict=True))), *given.values(), use_reentrant=reentrant)
        if not reentrant:
            assert_same(dict(zip(given, torch.autograd.grad(loss(out), list(given.values())), strict=True)), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(run_of(), given), expected)


def test_the_graph_goes_with_its_last_reference():
    given = leaves(call_of())
    gc.disable()
    try:
        o, _ = run_of()(**given)
        node = weakref.ref(o.grad_fn)
        o.sum().backward()
        del o, _
        assert node() is None
    finally:
        gc.enable()


def test_autocast_leaves_the_memory_in_float32():
    given = {name: x.detach() for name, x in leaves(call_of()).items()}
    o, state = run_of()(**given)
    with torch.autocast("cpu", torch.bfloat16):
        again, inside = run_of()(**given)
    assert torch.equal(o, again) and torch.equal(state.weights["W"], inside.weights["W"])


def test_inputs_as_they_come():
    """Views, transposes and unaligned tensors give what copies of them give."""
    case = call_of()
    expected = run_of()(**case.tensors)[0]
    fused = torch.cat([case.tensors["q"], case.tensors["k"]], -1)
    strided = dict(case.tensors, q=fused[..., :D], k=fused[..., D:], v=case.tensors["v"].transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(run_of()(**strided)[0], expected)
    v = case.tensors["v"]
    unaligned = torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v)
    assert torch.equal(run_of()(**dict(case.tensors, v=unaligned))[0], expected)


def test_numbers_tensors_and_their_gradients():
    """A number, a number a head and a number a token are one thing, and so are their gradients."""
    case = call_of()
    q, k, v = (case.tensors[n] for n in "qkv")
    B, T, Hv, _ = v.shape
    run = run_of(ADD)
    assert torch.equal(run(q, k, v, step=1.0)[0], run(q, k, v)[0])
    torch.testing.assert_close(run(q, k, v, step=0.5)[0], run(q, k, v, step=torch.full((B, T, Hv), 0.5))[0])
    torch.testing.assert_close(run(q, k, v, step=torch.tensor(0.5))[0], run(q, k, v, step=0.5)[0])
    for shape in ((), (Hv,), (B, T, Hv)):
        decay = torch.full(shape, -0.3, requires_grad=True)
        (got,) = torch.autograd.grad(loss(run_of()(q, k, v, step=0.5, log_decay=decay)), decay)
        (expected,) = torch.autograd.grad(loss(run_of(path="chunk")(q, k, v, step=0.5, log_decay=decay)), decay)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dtypes():
    """The widest of q, k and v computes; o comes in v's dtype, the state in float32."""
    q, k, v = (x.half() for x in call_of().tensors.values() if x.ndim == 4)
    o, state = run_of(ADD)(q, k.float(), v)
    assert o.dtype == torch.float16 and state.weights["W"].dtype == torch.float32
    assert torch.equal(o, run_of(ADD)(q.float(), k.float(), v.float())[0].half())
    signals = call_of().tensors
    half = dict(signals, step=signals["step"].half(), log_decay=signals["log_decay"].half())
    assert torch.equal(run_of()(**half)[0], run_of()(**dict(signals, **{n: half[n].float() for n in ("step", "log_decay")}))[0])


def test_nothing_to_read():
    q, v = torch.randn(2, 0, 1, D), torch.randn(2, 0, 2, D)
    start = torch.randn(2, 2, D, D)
    o, state = run_of(ADD)(q, q, v, initial_state=start)
    assert o.shape == v.shape and torch.equal(state.weights["W"], start)
    assert torch.equal(run_of(ADD)(q, q, v)[1].weights["W"], torch.zeros(2, 2, D, D))


def test_the_state_goes_from_path_to_path():
    case = call_of(T=30)
    expected = testing.evaluate(case, "chunk", splits=(13,), gradients=False)
    states = []
    for paths in itertools.product(("triton", "chunk"), repeat=2):
        state = case.initial_state
        for path, (a, b) in zip(paths, ((0, 13), (13, 30)), strict=True):
            _, state = run_of(path=path)(**case.tokens(a, b).tensors, initial_state=state)
        states.append(state.weights["W"])
    for W in states:
        torch.testing.assert_close(W, expected["weights.W"], rtol=1e-4, atol=1e-5)


def test_every_output_is_flat():
    """The Function's outputs beyond o and the state are what backward reads, and nothing differentiates them."""
    *arguments, _ = raw()
    outputs = op.ScalarGate.apply(*(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments))
    assert [x.requires_grad for x in outputs] == [True, True] + [False] * (len(outputs) - 2)
    outputs[0].sum().backward()
