"""Least squares solved exactly, and under a ridge that is forgotten: every gate, every read, against the chunk path in float64."""

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from torch import library

import ttr
from kernels.least_squares.problems import SPECS
from ttr import least_squares as definition
from ttr import testing
from ttr.kernels.torch import least_squares as torch_paths
from ttr.kernels.triton.eligible import why_not_triton
from ttr.kernels.triton.least_squares.path import lacking

from ..cuda_graph import captured
from .conftest import INTERPRETED
from .direct import in_dtype, poisoned
from .test_least_squares import check

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own


def declare(solver="cholesky", gate="none", read="after", decays=False, weight="sigmoid", ridge=1.0):
    """The ridge as in `mesanet`, or smaller."""
    regressor = {"kind": "least_squares", "weight": weight, "ridge": ridge, "ridge_floor": ridge / 4, "ridge_decays": decays}
    return ttr.spec({"regressor": regressor, "optimizer": solver, "gate": gate, "read": read})


MECHANISMS = {
    "mesa": ttr.spec("mesa"),
    "mesa, read before": declare("rls", read="before"),
    "no gate": declare(),
    "scalar": declare(gate="scalar"),
    "scalar, read before": declare(gate="scalar", read="before"),
    "vector": declare(gate="vector"),
    "vector, read before": declare(gate="vector", read="before"),
    "fixed gate, constant weight": declare(gate="fixed", weight=0.3),
    "constant gate of a channel": declare(gate={"kind": "vector", "value": -0.2}),
}
FORGOTTEN = {
    f"{kind}, {gate}": declare(solver, gate, "before" if gate == "vector" else "after", True)
    for (kind, solver), gate in product(
        {"rls": "rls", "cholesky": "cholesky", "cg": {"kind": "cg", "iterations": 6}}.items(), ("scalar", "vector")
    )
}
BOTH = pytest.mark.parametrize("name", ["mesa", "vector"])


def weakly(case: testing.Inputs) -> testing.Inputs:
    """Gates that leave a hundredth of the ridge at the end, and up to all of it."""
    given = case.tensors["log_decay"]
    share = torch.rand(given.shape, generator=torch.Generator().manual_seed(0), dtype=given.dtype)
    return replace(case, tensors={**case.tensors, "log_decay": -9 * share / given.shape[1]})


def test_every_least_squares_declaration_has_a_kernel():
    """All solvers, gates, ridges and reads of the conformance problems."""
    for spec in map(ttr.spec, SPECS.values()):
        assert why_not_triton(spec) is None, spec
    assert len(SPECS) > 30


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """Two chunks; extreme gates."""
    check(testing.random_inputs(MECHANISMS[name], T=35, B=1, H=1, Hv=1, dk=16, dv=16, seed=len(name)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_ridge_that_is_forgotten(name):
    """As long as some of it is left."""
    check(weakly(testing.random_inputs(FORGOTTEN[name], T=35, B=1, H=1, Hv=1, dk=16, dv=16, seed=len(name))))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", FORGOTTEN)
@pytest.mark.parametrize("packed", [False, True])
def test_a_ridge_that_is_gone(name, packed, monkeypatch):
    """Nothing but rounding and the least that is to stay of it determine what is read: as well as torch's paths in float32 do."""
    floor = 8 * torch.finfo(torch.float32).eps
    for module in (definition, torch_paths):
        monkeypatch.setattr(module, "least_scale", lambda dtype: floor)
    case = testing.random_inputs(FORGOTTEN[name], T=14, B=2 if packed else 1, H=1, Hv=1, dk=16, dv=16, extreme=True)
    case = in_dtype(testing.pack(case, (14, 5)) if packed else case, torch.float32)
    exact = testing.evaluate(case.to(torch.float64), "chunk")
    own = [testing.errors(testing.evaluate(case, path), exact) for path in ("chunk", "recurrent")]
    got = testing.evaluate(case, "triton")
    for what, error in testing.errors(got, exact).items():
        assert got[what].isfinite().all(), what
        if what != "d log_decay":  # a difference of which float32 keeps nothing
            assert error <= max(1e-4, 4 * max(x[what] for x in own)), (what, error, own)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("bounds", [None, (0, 5, 5, 23)], ids=str)
def test_what_a_ridge_lacks(gate, read, bounds):
    """The least scale less s_t, where s_t is below; around there, and past infinite decays."""
    n, generator = 1 if bounds is None else len(bounds) - 1, torch.Generator().manual_seed(0)
    decay = -3 * torch.rand(1, 23, 2, *((4,) if gate == "vector" else ()), generator=generator)
    decay[:, 20] = -float("inf")
    start = torch.rand(n, 2, 4, generator=generator)
    got = lacking(declare("cholesky", gate, read, True), start, decay, None if bounds is None else torch.tensor(bounds), (1, 23))
    least = definition.least_scale(torch.float32)
    for i, (first, end) in enumerate(pairwise(bounds or (0, 23))):
        scale = start[i].double()
        for t in range(first, end):
            before, scale = scale, scale * decay[0, t].double().exp().reshape(2, -1)
            expected = (least - (before if read == "before" else scale)).clamp(min=0)
            torch.testing.assert_close(got[0, t].double(), expected, rtol=1e-3, atol=1e-10)
    assert 0 < (got == 0).sum() < got.numel()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("name", "T", "dk", "dv"), [("mesa", 9, 48, 32), ("no gate", 31, 16, 80), ("scalar", 5, 32, 16), ("vector", 1, 48, 16)]
)
def test_sizes(name, T, dk, dv):
    check(testing.random_inputs(MECHANISMS[name], T=T, B=1, H=1, Hv=1, dk=dk, dv=dv, seed=T))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesa", "scalar, read before"])
def test_the_definition(name):
    check(testing.random_inputs(MECHANISMS[name], T=37, B=1, H=1, Hv=1, dk=16, dv=16), path="definition")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesa", "no gate", "vector, read before"])
def test_a_sequence_in_pieces(name):
    check(testing.random_inputs(MECHANISMS[name], T=37, B=1, H=1, Hv=1, dk=16, dv=32, extreme=False), splits=(3,))


@pytest.mark.usefixtures("interpreter")
def test_the_scale_of_a_ridge_goes_on():
    check(weakly(testing.random_inputs(FORGOTTEN["cholesky, scalar"], T=20, B=1, H=1, Hv=1, dk=16, dv=16)), splits=(3,))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "lengths"), [("mesa", (5, 0, 3)), ("scalar", (1, 18)), ("vector, read before", (5, 0, 18))])
def test_packed_sequences(name, lengths):
    H = 2 if name == "mesa" else 1  # which of them a value head shares
    case = testing.random_inputs(MECHANISMS[name], T=max(lengths), B=len(lengths), H=H, Hv=2 * H, dk=16, dv=16)
    check(testing.pack(case, lengths))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["none", "rls, scalar", "cholesky, vector"])
def test_packed_sequences_of_a_ridge_that_is_forgotten(name):
    spec = declare({"kind": "cg", "iterations": 6}, decays=True) if name == "none" else FORGOTTEN[name]
    case = testing.random_inputs(spec, T=9, B=3, H=1, Hv=2, dk=16, dv=16, extreme=False)
    check(testing.pack(case if name == "none" else weakly(case), (5, 0, 9)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -30.0, -100.0, float("-inf")])
@pytest.mark.parametrize("name", ["scalar", "vector"])
def test_one_gate_throughout(name, log_decay):
    case = testing.random_inputs(MECHANISMS[name], T=10, B=1, H=1, Hv=1, dk=16, dv=16)
    same = torch.full_like(case.tensors["log_decay"], log_decay)
    check(replace(case, tensors={**case.tensors, "log_decay": same}))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH
def test_16_bits_are_solved_in_float32(name, dtype):
    """Also bf16, which is never a kernel's operand here."""
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=9, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), dtype)
    o, state = testing.call(case, "triton")
    exact, last = testing.call(case.to(torch.float64), "chunk")
    assert o.dtype == dtype and testing.relative_error(o, exact) < torch.finfo(dtype).eps
    assert max(testing.relative_error(x, last.weights[n]) for n, x in state.weights.items()) < 2e-5


@pytest.mark.usefixtures("interpreter")
@BOTH
def test_autocast_leaves_the_memory_in_float32(name):
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=6, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), torch.float32)
    expected = testing.evaluate(case, "triton", splits=(2,), gradients=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = testing.evaluate(case, "triton", splits=(2,), gradients=False)
    assert all(torch.equal(x, expected[n]) and x.dtype == torch.float32 for n, x in got.items())


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["scalar", "vector"])
def test_one_token_laid_out_otherwise(name):
    """Of one token every layout is contiguous, whatever its strides say."""
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=1, B=3, H=1, Hv=2, dk=16, dv=16), torch.float32)
    other = {n: case.tensors[n].transpose(0, 1).contiguous().transpose(0, 1) for n in ("log_decay", "weight")}
    got, expected = (testing.call(x, "triton")[0] for x in (replace(case, tensors={**case.tensors, **other}), case))
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("interpreter")
@BOTH
def test_scaled_queries(name):
    """Forward and what comes back to them."""
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=6, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False), torch.float32)
    q, found = case.tensors["q"].requires_grad_(), []
    for path in ("triton", "chunk"):
        o, _ = ttr.regress(**case.tensors, spec=case.spec, params=case.params, scale=0.3, path=path)
        found.append((o, *torch.autograd.grad(o.square().sum(), q)))
    assert max(map(testing.relative_error, *found)) < 2e-5


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mesa", "no gate"])
def test_a_ridge_far_below_the_keys(name):
    """There an inverse is large, and much of it cancels: a dense solve in float32 is no better."""
    spec = ttr.spec(MECHANISMS[name], regressor={"ridge": 1e-3, "ridge_floor": 0.0})
    case = in_dtype(testing.random_inputs(spec, T=40, B=1, H=1, Hv=1, dk=32, dv=16, correlation=0.9), torch.float32)
    exact = testing.call(case.to(torch.float64), "chunk")[0]
    dense = testing.call(case, "definition")[0]
    for path in ("triton", "chunk"):
        assert testing.relative_error(testing.call(case, path)[0], exact) < 2 * testing.relative_error(dense, exact)


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Without iterations; packed."""
    case = in_dtype(testing.random_inputs(declare(), T=8, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    x, bounds = case.tensors, torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    inputs = (x["q"], x["k"], x["v"], None, x["weight"], torch.rand(1, 16) + 0.5, None, None, bounds)
    form = 1.0, None, 0.0, False
    check = partial(library.opcheck, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
    with poisoned():
        check(torch.ops.ttr.least_squares_forward.default, (*inputs, *form, True, False))
        o, last_G, last_H, solved, saved = torch.ops.ttr.least_squares_forward.default(*inputs, *form, True, False)
        check(torch.ops.ttr.least_squares_backward.default, (o, last_G, last_H, *inputs, solved, saved, *form, False))


@pytest.mark.parametrize("spec", ["mesa", ttr.spec("mesanet", optimizer="cholesky"), FORGOTTEN["cg, scalar"]])
def test_auto_takes_the_closed_form_of_torch(spec):
    """For mesa it is faster, of the others nobody knows; the kernels take less memory and are asked for by name."""
    known = {"device": "cuda", "dtype": torch.float16, "dk": 32, "dv": 32}
    path, why = ttr.select_path(spec, **known)
    assert path == "chunk" and re.search("path='triton' would be .*not timed", why)
    assert ttr.select_path(spec, path="triton", **known)[0] == "triton"


def test_heads_that_are_too_wide():
    known = {"path": "triton", "device": "cuda", "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=r"dk=144; with optimizer 'rls' least squares takes up to 128"):
        ttr.select_path("mesa", dk=144, **known)
    with pytest.raises(ValueError, match=r"dk=144; with a decaying ridge least squares takes up to 128"):
        ttr.select_path(FORGOTTEN["cg, scalar"], dk=144, **known)
    with pytest.raises(ValueError, match=r"dv=256 and the ridge's scale pass 256; choose dv up to 240"):
        ttr.select_path(FORGOTTEN["cg, scalar"], dk=64, dv=256, **known)


def test_recursive_least_squares_under_a_gate_carries_its_inverse():
    """auto prefers accuracy to speed there; the kernels are asked for by name."""
    assert ttr.select_path(FORGOTTEN["rls, scalar"], device="cuda")[0] == "recurrent"


gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 128), (96, 64), (16, 48)])
@pytest.mark.parametrize("name", ["mesa", "no gate", "scalar", "vector, read before"])
def test_on_the_gpu(name, dk, dv, dtype):
    case = testing.random_inputs(MECHANISMS[name], T=133, B=2, H=2, Hv=4, dk=dk, dv=dv, correlation=0.2)
    check(case, 2e-5 if dtype == torch.float32 else 8e-3, dtype, "cuda")


@gpu
@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_ridge_that_is_forgotten_on_the_gpu(name):
    check(weakly(testing.random_inputs(FORGOTTEN[name], T=133, B=1, H=1, Hv=2, dk=64, dv=64)), device="cuda")


@gpu
@pytest.mark.parametrize("lengths", [(5, 0, 64, 1, 133, 70), (2000,)], ids=str)
@BOTH
def test_packed_on_the_gpu(name, lengths):
    """Few heads and many tokens: the scan is cut."""
    case = testing.random_inputs(MECHANISMS[name], T=max(lengths), B=len(lengths), H=1, Hv=2, dk=64, dv=64, extreme=False, correlation=0.2)
    check(testing.pack(case, lengths), device="cuda")


@gpu
def test_forward_is_captured_by_a_cuda_graph():
    """Nothing asks the host, neither for the sequences' bounds nor whether a matrix had an inverse."""
    case = in_dtype(testing.random_inputs("mesa", T=141, B=2, H=2, Hv=2, dk=64, dv=64), torch.float32, "cuda")
    fresh = case.tensors["q"].flip(1)
    with torch.no_grad():
        graph, (o, _) = captured(lambda: testing.call(case, "triton"))
        case.tensors["q"].copy_(fresh)
        graph.replay()
        assert torch.equal(o, testing.call(case, "triton")[0])
