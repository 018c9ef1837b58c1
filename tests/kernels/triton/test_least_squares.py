"""Least squares solved by conjugate gradients: the kernels against the chunk path in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import library

import ttr
from ttr import testing
from ttr.kernels.decode import step_of
from ttr.kernels.triton.least_squares import plan, run
from ttr.kernels.triton.least_squares.op import LeastSquares

from ..cuda_graph import captured
from .conftest import INTERPRETED
from .direct import in_dtype, poisoned

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own


def declare(gate="scalar", read="after", weight="sigmoid", ridge=4.0, floor=0.25, **cg):
    """With a ridge under which few steps get far: what they leave magnifies what float32 has rounded."""
    regressor = {"kind": "least_squares", "weight": weight, "ridge": ridge, "ridge_floor": floor}
    return ttr.spec({"regressor": regressor, "optimizer": {"kind": "cg", "iterations": 6, **cg}, "gate": gate, "read": read})


MESANET = ttr.spec("mesanet", optimizer={"iterations": 6})  # fewer steps than the preset's 30: the interpreter is slow
BY_CHANNEL = declare("vector")
BOTH = pytest.mark.parametrize("spec", [MESANET, BY_CHANNEL], ids=["a decay a head", "a decay a channel"])
EXACT = ttr.spec("mesa"), ttr.spec(BY_CHANNEL, optimizer="cholesky")
ALL = pytest.mark.parametrize(
    "spec", [MESANET, BY_CHANNEL, *EXACT], ids=["a decay a head", "a decay a channel", "exact", "exact, a decay a channel"]
)

MECHANISMS = {
    "mesanet": MESANET,
    "mesanet, to the end": ttr.spec("mesanet"),
    "mesa, by cg": ttr.spec("mesa", optimizer={"kind": "cg", "iterations": 9}),
    "no gate": declare("none"),
    "fixed gate": declare("fixed"),
    "learned gate of a head": declare({"kind": "fixed", "decay": "learned"}),
    "constant gate": declare({"kind": "scalar", "value": -0.2}),
    "constant weight": declare(weight=0.3),
    "read before": declare(read="before"),
    "read before, no gate": declare("none", read="before"),
    "one step": declare(iterations=1),
    "few steps": declare(iterations=3),
    "tolerance": declare(tolerance=3e-2),
    "small ridge": declare("none", ridge=1e-2, floor=0.0, iterations=12),
    "by channel": BY_CHANNEL,
    "by channel, mesanet": ttr.spec("mesanet", gate="vector", optimizer={"iterations": 9}),
    "by channel, read before": declare("vector", read="before"),
    "by channel, constant weight": declare("vector", weight=0.3, iterations=3),
    "by channel, constant gate": declare({"kind": "vector", "value": -0.2}),
    "by channel, tolerance": declare("vector", tolerance=3e-2),
}


def check(
    case: testing.Inputs, bound: float = 2e-5, dtype: torch.dtype = torch.float32, device: str = "cpu", path="chunk", **options
) -> None:
    """A gradient of the gate is a difference of sums of order one; what torch loses in float32 to the solve is lost here, too."""
    case = in_dtype(case, dtype, device)
    with poisoned():
        got = testing.evaluate(case, "triton", **options)
    exact = testing.evaluate(case.to(torch.float64), path)
    own = testing.errors(testing.evaluate(case.to(torch.float32), "chunk"), exact)
    bounds = {name: max(bound, 3 * error) for name, error in own.items()}
    for name in bounds:
        if name == "d log_decay":
            bounds[name] /= min(1.0, max(1e-6, float(exact[name].abs().max())))
    testing.assert_close(got, exact, bounds, "least squares")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """Two chunks; two value heads a key head; extreme gates."""
    assert ttr.select_path(MECHANISMS[name], device="cuda")[0] == "triton"
    check(testing.random_inputs(MECHANISMS[name], T=37, B=1, H=1, Hv=2, dk=16, dv=16, seed=len(name)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("T", "dk", "dv"), [(1, 16, 16), (31, 32, 16), (33, 48, 32), (64, 16, 80), (70, 32, 32)])
@BOTH
def test_sizes(spec, T, dk, dv):
    check(testing.random_inputs(spec, T=T, B=1, H=1, Hv=1, dk=dk, dv=dv, seed=T, extreme=spec is MESANET))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesanet", "read before, no gate", "by channel", "by channel, read before"])
def test_the_definition(name):
    check(testing.random_inputs(MECHANISMS[name], T=37, B=1, H=1, Hv=1, dk=16, dv=16), path="definition")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesanet", "no gate", "read before", "by channel", "by channel, read before"])
def test_a_sequence_in_pieces(name):
    """Gradients go through the statistics that are handed on; a chunk begins where a piece does."""
    check(testing.random_inputs(MECHANISMS[name], T=37, B=1, H=1, Hv=1, dk=16, dv=32, extreme=False), splits=(3,))


@pytest.mark.usefixtures("interpreter")
@ALL
def test_the_state_goes_from_path_to_path(spec):
    case = in_dtype(testing.random_inputs(spec, T=40, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False), torch.float32)
    expected, _ = testing.call(case, "chunk")
    for first, second in (("chunk", "triton"), ("triton", "recurrent")):
        _, state = testing.call(case.tokens(0, 21), first)
        o, _ = testing.call(replace(case.tokens(21, 40), initial_state=state), second)
        torch.testing.assert_close(o, expected[:, 21:], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("lengths", [(20, 0, 3, 33), (1, 18)], ids=str)
@BOTH
def test_packed_sequences(spec, lengths):
    case = testing.random_inputs(spec, T=max(lengths), B=len(lengths), H=1, Hv=2, dk=16, dv=16)
    check(testing.pack(case, lengths))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -30.0, -100.0, float("-inf")])
@BOTH
def test_one_gate_throughout(spec, log_decay):
    case = testing.random_inputs(spec, T=40, B=1, H=1, Hv=1, dk=16, dv=16)
    same = torch.full_like(case.tensors["log_decay"], log_decay)
    check(replace(case, tensors={**case.tensors, "log_decay": same}))


@pytest.mark.usefixtures("interpreter")
def test_correlated_keys():
    check(testing.random_inputs(MECHANISMS["no gate"], T=70, B=1, H=1, Hv=1, dk=32, dv=16, correlation=0.95), 1e-4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("size", [2.0**-5, 1.0, 2.0**5])
@pytest.mark.parametrize("name", ["no gate", "by channel"])
def test_keys_of_any_size_in_half(name, size):
    """weight k k^T and weight k v^T stay what they are: in fp16 the operands of the solve are scaled, so o does, too."""
    case = testing.random_inputs(MECHANISMS[name], T=70, B=1, H=1, Hv=1, dk=16, dv=16)
    x = case.tensors
    case = replace(case, tensors={**x, "k": x["k"] * size, "v": x["v"] * size, "weight": x["weight"] / size**2})
    case = in_dtype(case, torch.float16)
    exact, _ = testing.call(case.to(torch.float64), "chunk")
    assert testing.relative_error(testing.call(case, "triton")[0], exact) < 2e-3


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesanet", "read before", "by channel", "by channel, read before"])
def test_half(name):
    """fp16 operands, packed and unpacked; also backward."""
    check(testing.random_inputs(MECHANISMS[name], T=70, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), 5e-3, torch.float16)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("gate", ["scalar", "none"])
def test_segments(gate):
    """The scan of few heads cut into pieces, directly: with more chunks than the public call would make of so few tokens."""
    spec, T = declare(gate, iterations=3), 16 * 16 + 5
    case = in_dtype(testing.random_inputs(spec, T=T, B=1, H=1, Hv=1, dk=16, dv=16, extreme=gate == "scalar"), torch.float32)
    x, first = case.tensors, torch.eye(16).expand(1, 1, 16, 16).contiguous()
    given = (x["k"], x.get("log_decay"), x["weight"], first, None)
    ridge, form, solved = torch.ones(1, 16), plan.Form(1.0, 3, 0.0, False), []
    for options in (plan.Options(16, 16, 4, 1, 4, 1e-7), plan.Options(64, 16, 4, 1, 4, 1e-7)):
        kind = plan.kind_of(x["k"], x["v"], x.get("log_decay"), x["weight"], first, None, False)
        p = plan.plan(kind._replace(options=options))
        assert p.segments == (2 if options.chunk == 16 else 1)
        with poisoned():
            statistics, last = run.statistics(p, *given)
            solved.append(run.solve(p, statistics, x["q"], x["k"], x.get("log_decay"), x["weight"], ridge, None, None, form, 1.0)[0])
    assert testing.relative_error(*solved) < 1e-5
    _, state = testing.call(replace(case, initial_state=ttr.State(weights={"G": first, "H": first}, spec_hash=spec.hash)), "chunk")
    assert testing.relative_error(last, state.weights["H"]) < 1e-6


def test_a_launch_is_for_the_same_arguments_to_be_none():
    """Forward gives no solution of another right-hand side, backward does: two launches, also where all heads are equal."""
    p = plan.plan(plan.kind_of(*[torch.empty(1, 16, 2, 16)] * 2, None, None, None, None, False))
    assert p.solve(2, False, False) is not p.solve(2, True, False) and p.solve(2, False, True) is p.solve(2, False, True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is no number
@pytest.mark.usefixtures("interpreter")
@ALL
def test_a_sequence_full_of_nan_spoils_no_neighbour(spec):
    case = testing.pack(testing.random_inputs(spec, T=40, B=3, H=1, Hv=1, dk=16, dv=16, extreme=False), [33, 40, 20])
    case = in_dtype(case, torch.float32)
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for name in nan.keys() - {"log_decay"}:
        nan[name][:, 33:73] = float("nan")
    clean, got = testing.call(case, "triton")[0], testing.call(replace(case, tensors=nan), "triton")[0]
    assert got[:, 33:73].isnan().all()
    assert torch.equal(torch.cat([got[:, :33], got[:, 73:]], 1), torch.cat([clean[:, :33], clean[:, 73:]], 1))


@pytest.mark.usefixtures("interpreter")
@ALL
def test_a_second_derivative_is_refused(spec):
    case = in_dtype(testing.random_inputs(spec, T=16, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    x = {name: t.requires_grad_() for name, t in case.tensors.items()}
    o, _ = testing.call(replace(case, tensors=x), "triton")
    (first,) = torch.autograd.grad(o.square().sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.usefixtures("interpreter")
@ALL
def test_traced_whole(spec):
    case = in_dtype(testing.random_inputs(spec, T=37, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False), torch.float32)

    def call(tensors, params):
        o, state = testing.call(replace(case, tensors=tensors, params=params), "triton")
        return o.square().sum() + sum(x.square().sum() for x in state.weights.values())

    leaves = {name: t.requires_grad_() for name, t in case.tensors.items()}
    params = {name: t.requires_grad_() for name, t in case.params.items()}
    flat = [*leaves.values(), *params.values()]
    eager = torch.autograd.grad(call(leaves, params), flat)
    got = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaves, params), flat)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("interpreter")
@BOTH
def test_export(spec):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, weight, log_decay, ridge):
            o, state = ttr.regress(q, k, v, spec, weight=weight, log_decay=log_decay, params={"ridge": ridge}, path="triton")
            return o, state.weights["H"]

    def arguments(T):
        case = in_dtype(testing.random_inputs(spec, T=T, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
        return *(case.tensors[name] for name in ("q", "k", "v", "weight", "log_decay")), case.params["ridge"]

    T = torch.export.Dim("T", min=8, max=4096)
    program = torch.export.export(Layer(), arguments(21), dynamic_shapes=(*[{1: T}] * 5, None), strict=False)
    assert any("least_squares_forward" in str(node.target) for node in program.graph.nodes)
    for got, expected in zip(program.module()(*arguments(35)), Layer()(*arguments(35)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("gate", "started", "packed"), [("scalar", True, False), ("none", False, True), ("vector", True, False), ("vector", False, True)]
)
def test_opcheck(gate, started, packed):
    """Schema, fake kernels, symbolic sizes, no hidden mutation."""
    case = in_dtype(testing.random_inputs(declare(gate), T=18, B=1 if packed else 2, H=1, Hv=1, dk=16, dv=16), torch.float32)
    x, n = case.tensors, 3 if packed else 2
    start = (torch.randn(n, 1, 16, 16), torch.eye(16).expand(n, 1, 16, 16).contiguous()) if started else (None, None)
    bounds = torch.tensor([0, 5, 5, 18], dtype=torch.int32) if packed else None
    inputs = (x["q"], x["k"], x["v"], x.get("log_decay"), x["weight"], torch.rand(1, 16) + 0.5, *start, bounds)
    form, learned = (1.0, 5, 0.0, False), gate != "none"
    check = partial(library.opcheck, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
    with poisoned():
        check(torch.ops.ttr.least_squares_forward.default, (*inputs, *form, True, learned))
        check(torch.ops.ttr.least_squares_forward.default, (*inputs, *form, False, False))
        o, last_G, last_H, solved, saved = torch.ops.ttr.least_squares_forward.default(*inputs, *form, True, learned)
        check(torch.ops.ttr.least_squares_backward.default, (o, last_G, last_H, *inputs, solved, saved, *form, learned))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("which", ["o", "G", "H"])
@BOTH
def test_one_output_alone(spec, which):
    case = in_dtype(testing.random_inputs(spec, T=20, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), torch.float32)
    leaves = {name: t.requires_grad_() for name, t in {**case.tensors, **case.params}.items()}
    live = replace(case, tensors={n: leaves[n] for n in case.tensors}, params={n: leaves[n] for n in case.params})

    def used(path):
        o, state = testing.call(live, path)
        out = o if which == "o" else state.weights[which]
        return torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)

    for name, got, expected in zip(leaves, used("triton"), used("chunk"), strict=True):
        zero = torch.zeros_like(leaves[name])
        assert testing.relative_error(zero if got is None else got, zero if expected is None else expected) < 2e-5, name


@pytest.mark.usefixtures("interpreter")
def test_every_output_is_flat():
    """The Function's outputs beyond o and the state are what backward reads, and nothing differentiates them."""
    q, ridge = torch.randn(1, 16, 1, 16, requires_grad=True), torch.ones(1, 16)
    outputs = LeastSquares.apply(q, q, q, None, None, ridge, None, None, None, 1.0, 3, 0.0, False, False)
    assert [x.requires_grad for x in outputs] == [True, True, True, False, False]
    outputs[0].sum().backward()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_a_mixer_trains_along_the_kernels(gate):
    torch.manual_seed(0)
    spec = ttr.spec("mesanet", gate=gate)
    mixer, other = (ttr.Mixer(32, spec, head_dim=16, path=path) for path in ("triton", "chunk"))
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 21, 32)
    for m in (mixer, other):
        m(x).square().sum().backward()
    for (name, p), r in zip(mixer.named_parameters(), other.parameters(), strict=True):
        assert testing.relative_error(p.grad, r.grad) < 1e-4, name


@pytest.mark.usefixtures("interpreter")
def test_nothing_to_read():
    q, params = torch.randn(2, 0, 1, 16), {"ridge": torch.zeros(1, 16)}
    o, state = ttr.regress(q, q, q, MECHANISMS["no gate"], weight=1.0, params=params, path="triton")
    assert o.shape == q.shape and not state.weights["H"].any()


def test_decoding_takes_the_recurrent_path():
    assert not step_of(MECHANISMS["mesanet"]).fused
    assert ttr.select_path("mesanet", device="cuda", length=1)[0] == "recurrent"


def test_wide_heads_in_float32():
    known = {"device": "cuda", "dk": 256, "dv": 128}
    with pytest.raises(ValueError, match=r"dk=256 in torch\.float32; least squares takes up to 128"):
        ttr.select_path("mesanet", path="triton", dtype=torch.float32, **known)
    assert ttr.select_path("mesanet", dtype=torch.bfloat16, **known)[0] == "triton"


gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")
# from an emulation of the 16-bit products, in which x and what is read of it lose 2e-3 (bfloat16)
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("name", "dk", "dv"), [
    ("mesanet, to the end", 64, 64), ("mesanet, to the end", 128, 128), ("few steps", 128, 64), ("read before", 96, 128),
    ("no gate", 256, 128), ("mesa, by cg", 64, 48),
])  # fmt: skip
def test_on_the_gpu(name, dk, dv, dtype):
    case = testing.random_inputs(MECHANISMS[name], T=333, B=2, H=2, Hv=4, dk=dk, dv=dv, extreme="before" in name, correlation=0.2)
    if dk > 128 and dtype == torch.float32:
        pytest.skip("refused, see above")
    check(case, BOUNDS[dtype], dtype, "cuda")


@gpu
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout_on_the_gpu(log_decay):
    case = testing.random_inputs("mesanet", T=150, B=1, H=2, Hv=2, dk=128, dv=128, correlation=0.2)
    same = torch.full_like(case.tensors["log_decay"], log_decay)
    check(replace(case, tensors={**case.tensors, "log_decay": same}), BOUNDS[torch.bfloat16], torch.bfloat16, "cuda")


@gpu
@pytest.mark.parametrize("lengths", [(5, 0, 64, 1, 333, 130), (2000,)], ids=str)
def test_packed_on_the_gpu(lengths):
    """Few heads and many tokens: the scan is cut."""
    case = testing.random_inputs("mesanet", T=max(lengths), B=len(lengths), H=1, Hv=2, dk=64, dv=64, extreme=False, correlation=0.2)
    check(testing.pack(case, lengths), BOUNDS[torch.bfloat16], torch.bfloat16, "cuda")


@gpu
def test_bitwise_the_same_from_run_to_run():
    case = in_dtype(testing.random_inputs("mesanet", T=256, B=8, H=4, Hv=4, dk=128, dv=128), torch.bfloat16, "cuda")
    first = testing.evaluate(case, "triton")
    assert all(torch.equal(x, first[name]) for name, x in testing.evaluate(case, "triton").items())


@gpu
@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_captured_by_a_cuda_graph(packed):
    """Nothing asks the host, neither for the sequences' bounds nor for how many steps it took."""
    case = testing.random_inputs("mesanet", T=141, B=2, H=2, Hv=2, dk=64, dv=64, extreme=False)
    case = in_dtype(testing.pack(case, (100, 41)) if packed else case, torch.bfloat16, "cuda")
    fresh = case.tensors["q"].flip(1)
    with torch.no_grad():
        graph, (o, _) = captured(lambda: testing.call(case, "triton"))
        case.tensors["q"].copy_(fresh)
        graph.replay()
        assert torch.equal(o, testing.call(case, "triton")[0])
