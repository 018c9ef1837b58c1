"""One event at a time: every linear declaration has a kernel, and the scan gives what the definition gives."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import library

import ttr
from kernels.test_conformance import CROSS_PRODUCT, SEPARATE, declare, sample
from ttr import registry, testing
from ttr.kernels.triton.eligible import why_not_chunks, why_not_triton
from ttr.kernels.triton.recurrent import run
from ttr.lowering import is_linear

from .conftest import INTERPRETED
from .direct import in_dtype, poisoned

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own

VARIANTS = [  # what no kernel over chunks serves; a step per value channel on the error, a slot with several steps, ...
    declare("none", "first", "delta", "plain", 1, "after", step={"per": "value"}),
    declare("scalar", "first", "momentum", "plain", 2, "before", step={"per": "value"}),
    declare("vector", "coupled", "delta", "implicit", 3, "after"),
    declare("vector", "first", "sgd", "plain", 2, "before"),
    declare("vector", "first", "averaged", "plain", 1, "after"),
    declare("vector", "coupled", "delta", "plain", 2, "after", step={"per": "key"}, write_key="separate"),
    declare("scalar", "coupled", "nesterov", "plain", 2, "after", write_key="separate"),
    ttr.spec({"optimizer": {"kind": "momentum", "steps": 2}, "objective": "dot", "gate": "vector", "read": {"normalizer": "sum"}}),
]


@pytest.fixture
def mixing(monkeypatch):
    """Declarations of an optimizer whose point, update and read are made of both slots, with signals per what is asked."""
    monkeypatch.setattr(registry.OPTIMIZERS, "_classes", dict(registry.OPTIMIZERS._classes))

    @ttr.optimizer("mixing")
    @dataclass(frozen=True, kw_only=True)
    class Mixing(ttr.Optimizer):
        """A rule of a test."""

        linear = True
        slots = ("other",)
        step: ttr.Signal = ttr.signal("sigmoid")
        momentum: ttr.Signal = ttr.signal("sigmoid")

        def point(self, z, s):
            return z[0] - 0.3 * s.momentum * z[1]

        def update(self, z, g, s):
            other = s.momentum * z[1] + 0.1 * s.step * z[0] + g
            return z[0] - s.step * other, other

        def read(self, z, s):
            return z[0] + s.step * z[1]

    def declared(step: str, momentum: str, **more):
        rule = {"kind": "mixing", "step": {"per": step}, "momentum": {"per": momentum}, **more}
        return ttr.spec({"optimizer": rule, "objective": "l2", "gate": "scalar"})

    return declared


def every_linear():
    """The conformance table's cross product, with keys to write with, steps per channel and normalisers."""
    yield from (declare(*row) for row in CROSS_PRODUCT)
    for row in SEPARATE:
        yield from (declare(*row, write_key="separate", step={"per": per}) for per in ("head", "key"))
    yield from VARIANTS
    yield from (spec for spec in map(ttr.spec, ttr.presets()) if is_linear_of(spec))


def is_linear_of(spec) -> bool:
    return spec.regressor.family == "trained" and is_linear(spec)


def test_every_linear_declaration_has_a_kernel():
    served = {"chunks": 0, "events": 0}
    for spec in every_linear():
        assert is_linear(spec) and why_not_triton(spec) is None, spec
        path, why = ttr.select_path(spec, path="triton", device="cuda", dtype=torch.float32, dk=64, dv=64, capability=(9, 0))
        alone = why_not_chunks(spec)
        assert path == "triton" and (("chunks" in why) if alone is None else why.endswith(alone))
        served["chunks" if alone is None else "events"] += 1
    assert min(served.values()) > 100, served


def by_events(count: int, seed: int) -> list:
    rows = [declare(*row) for row in sample(len(CROSS_PRODUCT), seed)]
    return [spec for spec in rows if why_not_chunks(spec) is not None][:count]


def check(case: testing.Inputs, splits=(), dtype: torch.dtype = torch.float32, bound: float = 1e-5, device: str = "cpu") -> None:
    case = in_dtype(case, dtype, device)
    with poisoned():
        got = testing.evaluate(case, "triton", splits)
    testing.assert_close(got, testing.evaluate(case.to(torch.float64), "recurrent"), bound, "one event at a time")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("spec", [*VARIANTS, *by_events(8, 5)], ids=lambda spec: spec.hash[:6])
def test_conforms(spec):
    """Any gate, an initial state, heads of no special size; two pieces on the way back, the second a part."""
    check(testing.random_inputs(spec, T=3, B=1, H=1, Hv=2, dk=3, dv=5, extreme=spec.read.normalizer == "none"))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("pers", [("value", "key"), ("value", "value"), ("key", "head")], ids="-".join)
def test_tiles_of_value_channels(pers, groups, mixing, monkeypatch):
    """Three tiles, the last not full, each by itself or several one after another; every coefficient per key, value or both."""
    monkeypatch.setattr(run, "TILE", 16)
    monkeypatch.setattr(run, "PROGRAMS", groups)
    check(testing.random_inputs(mixing(*pers, write_key="separate"), T=2, B=1, H=1, Hv=1, dk=3, dv=5))


@pytest.mark.usefixtures("interpreter")
def test_gradients_that_nobody_wants(mixing):
    """One at a time."""
    case = in_dtype(testing.random_inputs(mixing("value", "key", write_key="separate"), T=2, B=1, H=1, Hv=1, dk=3, dv=2), torch.float32)
    for name in case.tensors:
        leaf = case.tensors[name].clone().requires_grad_()
        alone = replace(case, tensors={**case.tensors, name: leaf})
        got, expected = (torch.autograd.grad(_summed(alone, path), leaf)[0] for path in ("triton", "recurrent"))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _summed(case: testing.Inputs, path: str) -> torch.Tensor:
    o, state = testing.call(case, path)
    return o.square().sum() + state.weights["W"].square().sum() + state.slots["other"]["W"].square().sum()


@pytest.mark.usefixtures("interpreter")
def test_packed_sequences():
    for spec in (VARIANTS[2], VARIANTS[-1]):  # the last one counts what it has read: another state
        extreme = spec.read.normalizer == "none"
        check(testing.pack(testing.random_inputs(spec, T=4, B=4, H=1, Hv=2, dk=3, dv=2, extreme=extreme), [0, 4, 0, 1]))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("path", ["triton", "recurrent"])
def test_a_sequence_full_of_nan_spoils_no_neighbour(path):
    case = in_dtype(testing.pack(testing.random_inputs(VARIANTS[0], T=2, B=3, H=1, Hv=1, dk=3, dv=2), [2, 0, 1]), torch.float32)
    spoilt = {name: torch.cat([torch.full_like(x[:, :2], torch.nan), x[:, 2:]], 1) for name, x in case.tensors.items()}
    leaves = {name: x.requires_grad_() for name, x in spoilt.items()}
    o, state = testing.call(replace(case, tensors=leaves), path)
    assert o[:, 2:].isfinite().all() and state.weights["W"][1:].isfinite().all()
    (o[:, 2:].sum() + state.weights["W"][1:].sum()).backward()
    assert all(x.grad[:, 2:].isfinite().all() for x in leaves.values())


@pytest.mark.usefixtures("interpreter")
def test_a_sequence_in_pieces():
    """The gradient goes through the states; one token alone."""
    check(testing.random_inputs(VARIANTS[4], T=5, B=1, H=1, Hv=1, dk=3, dv=2), splits=(1, 3))


@pytest.mark.usefixtures("interpreter")
def test_half_precision_is_computed_in_float32():
    check(testing.random_inputs("longhorn", T=4, B=1, H=1, Hv=1, dk=4, dv=4, extreme=False), dtype=torch.float16, bound=2e-3)


@pytest.mark.usefixtures("interpreter")
def test_three_slots(monkeypatch):
    """They are padded to a power of two; none of them starts, moves or is read as another."""
    monkeypatch.setattr(registry.OPTIMIZERS, "_classes", dict(registry.OPTIMIZERS._classes))

    @ttr.optimizer("relay")
    @dataclass(frozen=True, kw_only=True)
    class Relay(ttr.Optimizer):
        """A rule of a test."""

        linear = True
        slots = ("near", "far")
        step: ttr.Signal = ttr.signal("sigmoid")

        def update(self, z, g, s):
            w, near, far = z
            return w + 0.5 * near - s.step * g, 0.3 * near + far - g, 0.7 * far + 0.1 * w

        def read(self, z, s):
            return z[0] - 0.2 * z[2]

    spec = ttr.spec({"optimizer": Relay(), "objective": "l2", "gate": "scalar"})
    assert why_not_triton(spec) is None
    check(testing.random_inputs(spec, T=4, B=1, H=1, Hv=1, dk=3, dv=2))


@pytest.mark.usefixtures("interpreter")
def test_no_gradient_asked_of_some():
    """o alone, the last state alone, and a second derivative, which is refused."""
    case = in_dtype(testing.random_inputs(VARIANTS[0], T=3, B=1, H=1, Hv=1, dk=3, dv=2), torch.float32)
    for pick in (lambda o, state: o, lambda o, state: state.weights["W"]):
        grads = []
        for path in ("triton", "recurrent"):
            k = case.tensors["k"].clone().requires_grad_()
            out = pick(*testing.call(replace(case, tensors={**case.tensors, "k": k}), path))
            (grad,) = torch.autograd.grad(out.square().sum(), k, create_graph=True)
            grads.append(grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="no second derivative; use path='recurrent'"):
            grads[0].sum().backward()


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    q, k, v, A = torch.randn(1, 2, 4), torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 3), torch.rand(1, 1, 1, 2, 1, 1, 1)
    b, read, first = torch.rand(1, 1, 2, 1, 4, 1), torch.rand(1, 1, 2, 1, 1), torch.randn(1, 1, 4, 3)
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32)
    solved = (q, k, v, A, -b, b, read, None, None, None, first, None, True, False, 1)
    known = (q, k, None, A, b, None, read, b, k, v, torch.cat([first, first], 1), bounds, False, True, 1)
    with poisoned():
        for arguments in (solved, known):
            library.opcheck(torch.ops.ttr.recurrent_forward.default, arguments, test_utils=["test_schema", "test_faketensor"])
            o, last = torch.ops.ttr.recurrent_forward.default(*arguments)
            given = o, last if arguments is solved else None, *arguments, [x is not q for x in arguments[:11]]
            library.opcheck(torch.ops.ttr.recurrent_backward.default, given, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.usefixtures("interpreter")
def test_under_compile():
    """Without a break in the graph."""
    case = in_dtype(testing.random_inputs(VARIANTS[0], T=3, B=1, H=1, Hv=1, dk=3, dv=2), torch.float32)
    q, k, v, step = (case.tensors[name].requires_grad_() for name in ("q", "k", "v", "step"))

    def call(q, k, v, step):
        return ttr.regress(q, k, v, VARIANTS[0], step=step, path="triton")[0].square().sum()

    expected = torch.autograd.grad(call(q, k, v, step), (q, k, v, step))
    got = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, step), (q, k, v, step))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    packed = torch.tensor([0, 2, 3], dtype=torch.int32)  # its values are looked at on the device alone

    def states(q, k, v, step, packed):
        return ttr.regress(q, k, v, VARIANTS[0], step=step, cu_seqlens=packed, path="triton")[1].weights["W"]

    given = *(x.detach()[:1] for x in (q, k, v, step)), packed
    torch.testing.assert_close(torch.compile(states, fullgraph=True, backend="aot_eager")(*given), states(*given))


GPU = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [*VARIANTS, *by_events(24, 5)], ids=lambda spec: spec.hash[:6])
def test_on_the_gpu(spec, dtype):
    """The inputs are what the dtype makes of them, the computation float32; heads of no special size."""
    heads = {"H": 1, "Hv": 2} if spec.gate.kind == "fixed" else {"H": 2, "Hv": 4}  # of by_events' gates
    case = testing.random_inputs(spec, T=130, B=2, **heads, dk=40, dv=72, extreme=spec.read.normalizer == "none")
    bound = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    check(case, dtype=dtype, bound=bound, device="cuda")


@GPU
def test_bitwise_the_same_from_run_to_run():
    case = in_dtype(testing.random_inputs(VARIANTS[5], T=300, B=4, H=2, Hv=4, dk=128, dv=128), torch.float32, "cuda")
    first = testing.evaluate(case, "triton")
    assert all(torch.equal(x, first[name]) for name, x in testing.evaluate(case, "triton").items())


def test_sizes():
    assert ttr.select_path("longhorn", path="triton", device="cuda", dk=24, dv=1000)[0] == "triton"
    for dk in (512, 0):
        with pytest.raises(ValueError, match=rf"dk={dk}; choose 1 to 256"):
            ttr.select_path("longhorn", path="triton", device="cuda", dk=dk)


def test_where_it_stands_among_the_paths():
    """Before torch's one event at a time, behind its closed forms; `auto` says what it has passed by."""
    assert list(testing.targets(VARIANTS[2], device="cuda")) == ["chunk", "triton", "recurrent", "definition"]
    assert ttr.select_path("longhorn", device="cuda")[0] == "triton"
    path, why = ttr.select_path(VARIANTS[2], device="cuda")
    assert path == "chunk" and "; path='triton' would be a Triton kernel, one event at a time" in why
