"""Mini-batches of frozen gradients on two linear layers: the kernels against the dual form in float64."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import library

import ttr
from ttr import testing
from ttr.kernels.triton.eligible import predicts_as_its_layers
from ttr.kernels.triton.two_layers import op, parts, run

from . import low_precision
from .conftest import INTERPRETED
from .direct import check_some_gradients, in_dtype, poisoned
from .mechanisms import COUPLED, mini_batches

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own

LAYERS = {"kind": "mlp", "depth": 2, "expansion": 2.0, "bias": True}
FREE = {**LAYERS, "bias": False}
declare = partial(mini_batches, regressor=LAYERS)
MECHANISMS = {
    "ttt_mlp": declare(position="learned", regressor={**LAYERS, "activation": "gelu_tanh"}),
    "titans": declare("momentum", regressor=FREE, gate=COUPLED),
    "titans of 20": declare("momentum", regressor=FREE, gate=COUPLED, mini_batch=20),
    "titans, biased": declare("momentum", gate=COUPLED),
    "bare": declare(regressor={**FREE, "norm": "none", "residual": False, "activation": "relu"}),
    "gated, silu, no residual": declare(regressor={**LAYERS, "activation": "silu", "residual": False}, gate="scalar"),
    "averaged, tanh": declare("averaged", regressor={**FREE, "activation": "tanh"}, gate="scalar"),
    "read before": declare("momentum", regressor={**FREE, "expansion": 2.5}, gate="scalar", read="before"),
}


def case_of(spec, dtype=torch.float32, device="cpu", **sizes) -> testing.Inputs:
    """Keys of unit length and small steps: a memory of two layers that learns faster magnifies what was rounded without end."""
    case = testing.random_inputs(spec, **{"extreme": False} | sizes)
    unit = {name: torch.nn.functional.normalize(case.tensors[name], dim=-1) for name in "qk"}
    unit |= {"step": 0.03 * case.tensors["step"]} if "step" in case.tensors else {}
    return in_dtype(replace(case, tensors=case.tensors | unit), dtype, device)


def check(case: testing.Inputs, bound: float = 5e-5) -> None:
    """Within the bound or twice what the dual form loses with its products' operands rounded."""
    with poisoned():
        got = testing.evaluate(case, "triton")
    exact, dtype = testing.evaluate(case.to(torch.float64), "dual"), case.tensors["q"].dtype
    with low_precision.RoundedProducts(dtype) if dtype.itemsize == 2 else nullcontext():
        rounded = testing.errors(testing.evaluate(case, "dual"), exact)
    allowed = {name: max(bound, 2 * error) for name, error in rounded.items()}
    assert max(allowed.values()) < 0.5, "inputs that 16 bits cannot hold show nothing"
    testing.assert_close(got, exact, allowed, "two layers")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """Two whole mini-batches and an open one; two value heads a key head."""
    assert ttr.select_path(MECHANISMS[name], device="cuda")[0] == "triton"
    check(case_of(MECHANISMS[name], T=34, B=1, H=1, Hv=2, dk=16, dv=16, seed=len(name)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("name", ["ttt_mlp", "titans", "titans of 20"])
def test_in_groups(name, at_once, monkeypatch):
    """One mini-batch at a time, of one head, or of both of one sequence after the other's: what a group begins with is kept, or
    handed on, and a memory with which all sequences begin has the gradient of all."""
    monkeypatch.setattr(parts, "ON_CPU", at_once)
    monkeypatch.setattr(parts, "AT_A_TIME", 1)
    check(case_of(MECHANISMS[name], T=48, B=2, H=1, Hv=2, dk=16, dv=16))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("at_a_time", [1, 4, 16])
def test_as_many_groups_are_kept_as_the_fake_operator_says(at_a_time, monkeypatch):
    monkeypatch.setattr(parts, "AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    q, numbers = torch.randn(2, 80, 1, 16) / 4, -torch.rand(2, 80, 1) / 16
    first = torch.randn(2, 1, 1, 2 * 16 * 32) / 8
    form = 16, 32, False, "gelu", False, 1e-6, 1 / 16, 1 / 16, False
    given = q, q, q, None, None, numbers, None, None, None, None, first, *form
    library.opcheck(torch.ops.ttr.two_layers_forward.default, (*given, True), test_utils="test_faketensor")
    assert op.forward(*given, True)[2].shape[0] == {1: 4, 4: 2, 16: 0}[at_a_time]


def test_a_row_of_checkpoints_begins_on_16_bytes():
    assert [parts.row_of(n, torch.empty(1, 1)) for n in (1, 3, 4, 5)] == [4, 4, 4, 8]


@pytest.mark.usefixtures("interpreter")
def test_keys_and_values_of_different_widths():
    spec = declare(regressor={**LAYERS, "residual": False, "expansion": 1.5}, mini_batch=17)
    check(case_of(spec, T=34, B=1, H=1, Hv=1, dk=32, dv=48))


@pytest.mark.usefixtures("interpreter")
def test_a_sequence_in_pieces():
    """Split at every kind of place: where a mini-batch begins, and inside one; the gradient goes through the states."""
    case = case_of(MECHANISMS["titans"], T=49, B=1, H=1, Hv=1, dk=16, dv=16)
    whole = testing.evaluate(case, "triton")
    testing.assert_close(testing.evaluate(case, "triton", splits=(3, 16, 40)), whole, 2e-5, "pieces")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["ttt_mlp", "titans"])
def test_packed_sequences(name):
    check(testing.pack(case_of(MECHANISMS[name], T=19, B=3, H=1, Hv=1, dk=16, dv=16), [19, 0, 3]))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["ttt_mlp", "titans"])
def test_some_gradients_alone(name):
    check_some_gradients(case_of(MECHANISMS[name], T=32, B=1, H=1, Hv=1, dk=16, dv=16))


@pytest.mark.usefixtures("interpreter")
def test_a_second_derivative_is_refused():
    case = case_of(MECHANISMS["bare"], T=16, B=1, H=1, Hv=1, dk=16, dv=16)
    x = {name: t.requires_grad_() for name, t in case.tensors.items()}
    o, _ = testing.call(replace(case, tensors=x), "triton")
    (first,) = torch.autograd.grad(o.square().sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.usefixtures("interpreter")
def test_traced_whole():
    case = case_of(MECHANISMS["ttt_mlp"], T=20, B=1, H=1, Hv=1, dk=16, dv=16)

    def call(tensors, params):
        return testing.call(replace(case, tensors=tensors, params=params), "triton")[0]

    tensors = {name: t.requires_grad_() for name, t in case.tensors.items()}
    eager = call(tensors, case.params)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(tensors, case.params)
    torch.testing.assert_close(got, eager)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), list(tensors.values())) for x in (got, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_predict_of_ones_own_is_not_taken_for_the_layers():
    regressor = declare().regressor
    assert predicts_as_its_layers(regressor)

    class Doubled(type(regressor)):
        def predict(self, w, x):
            return 2 * super().predict(w, x)

    assert not predicts_as_its_layers(Doubled(depth=2, expansion=2.0, bias=True))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (declare(regressor={"kind": "mlp", "depth": 3}), "one linear layer or two"),
        (declare(regressor={"kind": "mlp", "depth": 2, "glu": True}), "one linear layer or two"),
        (declare("momentum", nesterov=True), "elsewhere than at the weights"),
    ],
)
def test_what_the_kernels_do_not_take(spec, why):
    with pytest.raises(ValueError, match=why):
        ttr.select_path(spec, path="triton", device="cuda")
    assert ttr.select_path(spec, device="cuda")[0] == "dual"


def test_heads_that_are_too_wide():
    with pytest.raises(ValueError, match="multiple of 16 up to 64"):
        ttr.select_path(MECHANISMS["titans"], path="triton", device="cuda", dk=128, dv=128)
    with pytest.raises(ValueError, match="8256 hidden units; choose up to 8192"):
        ttr.select_path(declare(regressor={**LAYERS, "expansion": 129.0}), path="triton", device="cuda", dk=64, dv=64)


needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")
BOUNDS = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@needs_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("name", "d", "size", "expansion"), [
    ("ttt_mlp", 64, 16, 4.0), ("titans", 64, 64, 4.0), ("titans, biased", 64, 64, 1.0), ("titans, biased", 64, 64, 4.0), ("titans", 32, 32, 4.0), ("bare", 48, 40, 2.5),
])  # fmt: skip
def test_on_the_gpu(name, d, size, expansion, dtype):
    """One program a head and several; heads of several groups."""
    if d != 64 and dtype != torch.float32:
        pytest.skip("refused in 16 bits")
    spec = ttr.spec(MECHANISMS[name], optimizer={"mini_batch": size}, regressor={"expansion": expansion})
    check(case_of(spec, dtype, "cuda", T=3 * size + 5, B=5, H=4, Hv=8, dk=d, dv=d), BOUNDS[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_few_heads_on_the_gpu(dtype):
    """A multiprocessor for every program; 40 heads of four programs in `test_on_the_gpu` have two on some."""
    spec = ttr.spec(MECHANISMS["titans"], optimizer={"mini_batch": 64}, regressor={"expansion": 4.0})
    check(case_of(spec, dtype, "cuda", T=64 * 3, B=1, H=8, Hv=8, dk=64, dv=64), BOUNDS[dtype])


@needs_gpu
def test_in_groups_on_the_gpu(monkeypatch):
    """Several programs a head, several groups of mini-batches and more sequences than run at once: what each begins with is kept,
    and nobody counts on."""
    for where in (op, run):
        monkeypatch.setattr(where, "group_of", lambda batches, heads, hidden, device: 2)
    spec = ttr.spec(MECHANISMS["titans"], optimizer={"mini_batch": 64}, regressor={"expansion": 4.0})
    check(case_of(spec, torch.bfloat16, "cuda", T=64 * 5, B=11, H=8, Hv=8, dk=64, dv=64), BOUNDS[torch.bfloat16])


@needs_gpu
def test_bitwise_the_same_from_run_to_run():
    spec = ttr.spec(MECHANISMS["titans"], optimizer={"mini_batch": 64}, regressor={"expansion": 4.0})
    case = case_of(spec, torch.bfloat16, "cuda", T=512, B=8, H=8, Hv=8, dk=64, dv=64)
    first = testing.evaluate(case, "triton")
    assert all(torch.equal(x, first[name]) for name, x in testing.evaluate(case, "triton").items())
