"""Least squares solved by conjugate gradients: the kernels against the chunk path in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.triton.least_squares import run
from ttr.kernels.triton.least_squares.op import LeastSquares

from .conftest import INTERPRETED
from .direct import in_dtype, poisoned

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own


def declare(gate="scalar", read="after", weight="sigmoid", ridge=1.0, floor=0.25, **cg):
    regressor = {"kind": "least_squares", "weight": weight, "ridge": ridge, "ridge_floor": floor}
    return ttr.spec({"regressor": regressor, "optimizer": {"kind": "cg", **cg}, "gate": gate, "read": read})


MECHANISMS = {
    "mesanet": ttr.spec("mesanet"),
    "mesa, by cg": ttr.spec("mesa", optimizer={"kind": "cg"}),
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
    "small ridge": declare("none", ridge=1e-2, floor=0.0, iterations=40),
}


def check(case: testing.Inputs, bound: float = 2e-5, dtype: torch.dtype = torch.float32, device: str = "cpu", **options) -> None:
    case = in_dtype(case, dtype, device)
    with poisoned():
        got = testing.evaluate(case, "triton", **options)
    testing.assert_close(got, testing.evaluate(case.to(torch.float64), "chunk"), bound, "least squares")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """Two chunks; two value heads a key head; extreme gates."""
    assert ttr.select_path(MECHANISMS[name], device="cuda")[0] == "triton"
    check(testing.random_inputs(MECHANISMS[name], T=43, B=2, H=1, Hv=2, dk=16, dv=16, seed=len(name)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("T", "dk", "dv"), [(1, 16, 16), (31, 32, 16), (33, 48, 32), (64, 16, 80), (97, 32, 32)])
def test_sizes(T, dk, dv):
    check(testing.random_inputs("mesanet", T=T, B=1, H=1, Hv=1, dk=dk, dv=dv, seed=T))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesanet", "read before, no gate"])
def test_the_definition(name):
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=37, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    exact = testing.evaluate(case.to(torch.float64), "definition")
    testing.assert_close(testing.evaluate(case, "triton"), exact, 2e-5, name)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesanet", "no gate", "read before"])
def test_a_sequence_in_pieces(name):
    """Gradients go through the statistics that are handed on; a chunk begins where a piece does."""
    check(testing.random_inputs(MECHANISMS[name], T=75, B=2, H=1, Hv=2, dk=16, dv=32, extreme=False), splits=(3, 40))


@pytest.mark.usefixtures("interpreter")
def test_the_state_goes_from_path_to_path():
    case = in_dtype(testing.random_inputs("mesanet", T=40, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False), torch.float32)
    expected, _ = testing.call(case, "chunk")
    for first, second in (("chunk", "triton"), ("triton", "recurrent")):
        _, state = testing.call(case.tokens(0, 21), first)
        o, _ = testing.call(replace(case.tokens(21, 40), initial_state=state), second)
        torch.testing.assert_close(o, expected[:, 21:], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("lengths", [(35, 0, 3, 64), (1,)], ids=str)
def test_packed_sequences(lengths):
    case = testing.random_inputs("mesanet", T=max(lengths), B=len(lengths), H=1, Hv=2, dk=16, dv=16)
    check(testing.pack(case, lengths))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout(log_decay):
    case = testing.random_inputs("mesanet", T=40, B=1, H=1, Hv=1, dk=16, dv=16)
    same = torch.full_like(case.tensors["log_decay"], log_decay)
    check(replace(case, tensors={**case.tensors, "log_decay": same}))


@pytest.mark.usefixtures("interpreter")
def test_correlated_keys():
    check(testing.random_inputs(MECHANISMS["no gate"], T=70, B=1, H=1, Hv=1, dk=32, dv=16, correlation=0.95), 1e-4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 1e5])
def test_numbers_of_any_size_in_half(size):
    """Keys, weights and queries far from 1: in fp16 the operands of the solve are scaled, so only the inputs' rounding is left."""
    case = testing.random_inputs(MECHANISMS["no gate"], T=70, B=1, H=1, Hv=1, dk=16, dv=16)
    x = {**case.tensors, "k": case.tensors["k"] * 8, "weight": case.tensors["weight"] * size}
    case = replace(case, tensors=x, params={"ridge": torch.full_like(case.params["ridge"], max(1.0, size))})
    case = in_dtype(case, torch.float16)
    o, _ = testing.call(case, "triton")
    exact, _ = testing.call(case.to(torch.float64), "chunk")
    assert testing.relative_error(o, exact) < 5e-3


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("gate", ["scalar", "none"])
def test_segments(gate):
    """A scan of few heads cut into pieces, directly: more chunks than the public call would ask for."""
    spec, options = declare(gate), run.Options(16, 16, 4, 1, 4, 1e-7)
    T = 16 * 16 + 5
    case = in_dtype(testing.random_inputs(spec, T=T, B=1, H=1, Hv=1, dk=16, dv=16, extreme=gate == "scalar"), torch.float32)
    x = case.tensors
    ridge = ttr.least_squares.ridge_of(spec, case.params, x["q"])
    first = torch.eye(16).expand(1, 1, 16, 16).contiguous()
    given = (x["q"], x["k"], x["v"], x.get("log_decay"), x["weight"], ridge, first, first, None)
    p = run.plan(run.kind_of(x["k"], x["v"], x.get("log_decay"), x["weight"], first, None, False, options))
    assert p.segments > 1
    o, last_G, last_H, *_ = run.forward(*given, run.Form(1.0, 30, 0.0, False), True, True, options)
    state = ttr.State(weights={"G": first, "H": first}, spec_hash=spec.hash)
    exact, last = testing.call(replace(case, initial_state=state).to(torch.float32), "chunk")
    for got, expected in ((o, exact), (last_G, last.weights["G"]), (last_H, last.weights["H"])):
        assert testing.relative_error(got, expected) < 1e-5


@pytest.mark.usefixtures("interpreter")
def test_a_sequence_full_of_nan_spoils_no_neighbour():
    case = testing.pack(testing.random_inputs("mesanet", T=40, B=3, H=1, Hv=1, dk=16, dv=16, extreme=False), [33, 40, 20])
    case = in_dtype(case, torch.float32)
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for name in ("q", "k", "v", "weight"):
        nan[name][:, 33:73] = float("nan")
    clean, got = testing.call(case, "triton")[0], testing.call(replace(case, tensors=nan), "triton")[0]
    assert got[:, 33:73].isnan().all()
    assert torch.equal(torch.cat([got[:, :33], got[:, 73:]], 1), torch.cat([clean[:, :33], clean[:, 73:]], 1))


@pytest.mark.usefixtures("interpreter")
def test_a_second_derivative_is_refused():
    case = in_dtype(testing.random_inputs("mesanet", T=16, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    x = {name: t.requires_grad_() for name, t in case.tensors.items()}
    o, _ = testing.call(replace(case, tensors=x), "triton")
    (first,) = torch.autograd.grad(o.square().sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("T", [21, 40])
def test_traced_whole(T):
    case = in_dtype(testing.random_inputs("mesanet", T=T, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False), torch.float32)

    def call(tensors, params):
        o, state = testing.call(replace(case, tensors=tensors, params=params), "triton")
        return o.square().sum() + state.weights["G"].square().sum() + state.weights["H"].square().sum()

    leaves = {name: t.requires_grad_() for name, t in case.tensors.items()}
    params = {name: t.requires_grad_() for name, t in case.params.items()}
    flat = [*leaves.values(), *params.values()]
    eager = torch.autograd.grad(call(leaves, params), flat)
    got = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaves, params), flat)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("interpreter")
def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, weight, log_decay, ridge):
            o, state = ttr.regress(q, k, v, "mesanet", weight=weight, log_decay=log_decay, params={"ridge": ridge}, path="triton")
            return o, state.weights["H"]

    def arguments(T):
        case = in_dtype(testing.random_inputs("mesanet", T=T, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
        return *(case.tensors[name] for name in ("q", "k", "v", "weight", "log_decay")), case.params["ridge"]

    T = torch.export.Dim("T", min=8, max=4096)
    program = torch.export.export(Layer(), arguments(21), dynamic_shapes=(*[{1: T}] * 5, None), strict=False)
    assert any("least_squares_forward" in str(node.target) for node in program.graph.nodes)
    for got, expected in zip(program.module()(*arguments(35)), Layer()(*arguments(35)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("gate", "started", "packed"), [("scalar", True, False), ("none", False, True)])
def test_opcheck(gate, started, packed):
    """Schema, fake kernels, symbolic sizes, no hidden mutation."""
    case = in_dtype(testing.random_inputs(declare(gate), T=37, B=1 if packed else 2, H=1, Hv=2, dk=16, dv=16), torch.float32)
    x, n = case.tensors, 3 if packed else 2
    start = (torch.randn(n, 2, 16, 16), torch.eye(16).expand(n, 2, 16, 16).contiguous()) if started else (None, None)
    bounds = torch.tensor([0, 5, 5, 37], dtype=torch.int32) if packed else None
    inputs = (x["q"], x["k"], x["v"], x.get("log_decay"), x["weight"], torch.rand(2, 16) + 0.5, *start, bounds)
    form, learned = (1.0, 5, 0.0, False), gate == "scalar"
    check = partial(torch.library.opcheck, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
    with poisoned():
        check(torch.ops.ttr.least_squares_forward.default, (*inputs, *form, True, learned))
        check(torch.ops.ttr.least_squares_forward.default, (*inputs, *form, False, False))
        o, last_G, last_H, solved, saved = torch.ops.ttr.least_squares_forward.default(*inputs, *form, True, learned)
        check(torch.ops.ttr.least_squares_backward.default, (o, last_G, last_H, *inputs, solved, saved, *form, learned))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("which", ["o", "G", "H"])
def test_one_output_alone(which):
    case = in_dtype(testing.random_inputs("mesanet", T=20, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), torch.float32)
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
def test_a_mixer_trains_along_the_kernels():
    torch.manual_seed(0)
    mixer, other = (ttr.Mixer(32, "mesanet", head_dim=16, path=path) for path in ("triton", "chunk"))
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 21, 32)
    for m in (mixer, other):
        m(x).square().sum().backward()
    for (name, p), r in zip(mixer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.usefixtures("interpreter")
def test_nothing_to_read():
    q, params = torch.randn(2, 0, 1, 16), {"ridge": torch.zeros(1, 16)}
    o, state = ttr.regress(q, q, q, MECHANISMS["no gate"], weight=1.0, params=params, path="triton")
    assert o.shape == q.shape and not state.weights["H"].any()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("mesa", "optimizer 'rls' solves exactly"),
        (ttr.spec("mesanet", optimizer="cholesky"), "optimizer 'cholesky' solves exactly"),
        (ttr.spec("mesanet", gate="vector"), "gate 'vector' decays every key channel"),
        (ttr.spec("mesanet", **{"regressor.ridge_decays": True}), "regressor.ridge_decays=true: the kernels take one ridge"),
    ],
)
def test_what_the_kernels_do_not_take(spec, why):
    with pytest.raises(ValueError, match=why):
        ttr.select_path(spec, path="triton", device="cuda")
    assert ttr.select_path(spec, device="cuda")[0] == "chunk"


gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")
