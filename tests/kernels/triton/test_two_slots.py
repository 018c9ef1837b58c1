"""Optimizers with one slot beside the weights: the kernels against the chunk path in float64."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import library

import ttr
from ttr import registry, testing
from ttr.kernels.triton.launch import Bound
from ttr.kernels.triton.two_slots import run
from ttr.kernels.triton.two_slots.tiling import Launch, Tiling, tiling_of

from . import low_precision
from .conftest import INTERPRETED
from .direct import in_dtype, poisoned

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own

COUPLED = {"kind": "scalar", "order": "coupled"}


def declare(kind="momentum", objective="l2", gate="none", read="after", **fields):
    return ttr.spec({"regressor": "linear", "objective": objective, "optimizer": {"kind": kind, **fields}, "gate": gate, "read": read})


MECHANISMS = {
    "momentum": declare(),
    "momentum, dot": declare(objective="dot", gate="scalar"),
    "momentum, gated": declare(gate="scalar"),
    "titans, linear": declare(gate=COUPLED),
    "numbers for signals": declare(gate="fixed", step=0.5, momentum=0.5),
    "read before": declare(read="before", gate="scalar"),
    "dot, read before": declare(objective="dot", read="before", gate=COUPLED),
    "nesterov": declare(nesterov=True, gate="scalar"),
    "nesterov, coupled, read before": declare(nesterov=True, gate=COUPLED, read="before"),
    "nlms": declare(gate="scalar", step_rule="nlms"),
    "implicit": declare(gate=COUPLED, step_rule="implicit", nesterov=True),
    "mean": declare(objective={"kind": "l2", "reduce": "mean"}),
    "averaged": declare("averaged", gate="scalar"),
    "averaged, dot, read before": declare("averaged", objective="dot", gate=COUPLED, read="before"),
    "normalised": declare(objective="dot", gate="scalar", read={"normalizer": "sum"}),
}


def check(case: testing.Inputs, bound: float = 1e-5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Within the bound or, in 16 bits, three times what an ideal run loses there, which rounds nothing but the operands of products:
    momentum magnifies what was rounded."""
    case = in_dtype(case, dtype, device)
    with poisoned():
        got = testing.evaluate(case, "triton")
    exact = testing.evaluate(case.to(torch.float64), {"kind": "chunk", "chunk_size": 16})
    rounded = testing.errors(low_precision.evaluate(case), exact) if dtype.itemsize == 2 else dict.fromkeys(exact, 0.0)
    allowed = {name: max(bound, 3 * error) for name, error in rounded.items()}
    assert max(allowed.values()) < 0.2, "inputs that 16 bits cannot hold show nothing"
    testing.assert_close(got, exact, allowed, "two slots")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """A whole chunk and a part of one; two value heads a key head; extreme gates; an initial state."""
    assert ttr.select_path(MECHANISMS[name], device="cuda")[0] == "triton"
    check(testing.random_inputs(MECHANISMS[name], T=19, B=1, H=1, Hv=2, dk=16, dv=16, seed=len(name)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("T", "dk", "dv"), [(1, 16, 16), (16, 48, 16), (33, 16, 48)])
def test_sizes(T, dk, dv):
    """Heads that are no power of two; one token, whole chunks alone, more than two; two key heads; nothing to start from."""
    check(testing.random_inputs(MECHANISMS["nesterov"], T=T, B=1, H=2, Hv=2, dk=dk, dv=dv, seed=T, state=T > 1))


TILINGS = {
    "32": Tiling(32, Launch(0, 4), Launch(16, 4), Launch(16, 4), Launch(32, 4), Launch(0, 4), Launch(16, 4)),
    "64": Tiling(64, Launch(0, 4), Launch(32, 4), Launch(32, 4), Launch(16, 4), Launch(0, 4), Launch(32, 4)),
}


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("chunk", TILINGS)
def test_chunks_as_on_the_gpu(chunk, monkeypatch):
    """The result is the chunk path's whatever the chunk; tiles narrower than a head."""
    monkeypatch.setattr("ttr.kernels.triton.two_slots.op.tiling_of", lambda *_: TILINGS[chunk])
    monkeypatch.setattr(run, "tiling_of", lambda *_: TILINGS[chunk])
    check(testing.random_inputs(MECHANISMS["momentum, gated"], T=70, B=1, H=1, Hv=1, dk=32, dv=32))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("log_momentum", [0.0, -1.5, -30.0, -100.0, float("-inf")])
def test_any_momentum(log_momentum):
    """One throughout: nothing is divided by it, so a strong one is as exact as none."""
    case = testing.random_inputs(MECHANISMS["titans, linear"], T=18, B=1, H=1, Hv=1, dk=16, dv=16)
    step = case.tensors["step"] * (0.1 if log_momentum == 0 else 1.0)
    momentum = torch.full_like(step, log_momentum).exp()
    check(replace(case, tensors={**case.tensors, "step": step, "momentum": momentum}))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout(log_decay):
    case = testing.random_inputs(MECHANISMS["nesterov"], T=18, B=1, H=1, Hv=1, dk=16, dv=16)
    same = torch.full_like(case.tensors["log_decay"], log_decay)
    check(replace(case, tensors={**case.tensors, "log_decay": same}))


@pytest.mark.usefixtures("interpreter")
def test_correlated_keys():
    check(testing.random_inputs(MECHANISMS["momentum"], T=40, B=1, H=1, Hv=1, dk=16, dv=16, correlation=0.95))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["nesterov", "averaged"])
def test_a_sequence_in_pieces(name):
    """The gradient goes through the states."""
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=21, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    testing.assert_close(testing.evaluate(case, "triton", splits=(3, 19)), testing.evaluate(case, "triton"), 1e-5, name)


@pytest.mark.usefixtures("interpreter")
def test_packed_sequences():
    lengths = [17, 0, 3, 16]
    check(testing.pack(testing.random_inputs(MECHANISMS["momentum, gated"], T=17, B=4, H=1, Hv=1, dk=16, dv=16), lengths))


@pytest.mark.usefixtures("interpreter")
def test_no_tokens():
    spec = MECHANISMS["averaged"]
    start = torch.randn(2, 1, 16, 16)
    empty = torch.zeros(2, 0, 1, 16)
    o, state = ttr.regress(empty, empty, empty, spec, step=0.5, average=0.5, log_decay=-1.0, initial_state=start, path="triton")
    assert o.shape == empty.shape and torch.equal(state.weights["W"], start) and torch.equal(state.slots["average"]["W"], start)


@pytest.mark.usefixtures("interpreter")
def test_an_optimizer_of_ones_own(monkeypatch):
    """Nothing in it is momentum: both slots move both, the query reads a mixture, and the slot starts elsewhere than at zero."""
    monkeypatch.setattr(registry.OPTIMIZERS, "_classes", dict(registry.OPTIMIZERS._classes))

    @ttr.optimizer("swapping")
    @dataclass(frozen=True, kw_only=True)
    class Swapping(ttr.Optimizer):
        """A rule of a test."""

        linear = True
        slots = ("other",)
        decayed = ("other",)
        step: ttr.Signal = ttr.signal("sigmoid")
        share: ttr.Signal = ttr.signal("sigmoid")

        def init_slots(self, w):
            return (w + 1.0,)

        def point(self, z, s):
            return z[1] - s.share * z[0]

        def update(self, z, g, s):
            return 0.5 * z[1] - s.step * g, s.share * z[0] + 0.3 * g

        def read(self, z, s):
            return s.share * z[0] + z[1]

    for read in ("after", "before"):
        spec = ttr.spec({"regressor": "linear", "optimizer": Swapping(), "objective": "l2", "gate": "scalar", "read": read})
        assert ttr.select_path(spec, device="cuda")[0] == "triton"
        check(testing.random_inputs(spec, T=18, B=1, H=1, Hv=1, dk=16, dv=16))
        check(testing.random_inputs(spec, T=5, B=1, H=1, Hv=1, dk=16, dv=16, state=False))


@pytest.mark.usefixtures("interpreter")
def test_a_launch_is_always_given_the_same_tensors(monkeypatch):
    """Bound launches are told apart by what decides which arguments are None: what one was compiled for is never another's."""
    given: dict[Bound, set] = {}
    call = Bound.__call__

    def recorded(self, *arguments):
        given.setdefault(self, set()).add(tuple(x is None for x in arguments))
        call(self, *arguments)

    monkeypatch.setattr(Bound, "__call__", recorded)
    run.launches.cache_clear()
    for name, state, lengths in itertools.product(("momentum", "momentum, dot"), (True, False), (None, [2, 3])):
        case = testing.random_inputs(MECHANISMS[name], T=3, B=1 if lengths is None else 2, H=1, Hv=1, dk=16, dv=16, state=state)
        case = in_dtype(case if lengths is None else testing.pack(case, lengths), torch.float32)
        for ends in (1, 2):
            leaves = {n: x.requires_grad_() for n, x in case.tensors.items()}
            o, after = testing.call(replace(case, tensors=leaves), "triton")
            sum(x.sum() for x in (o, after.weights["W"])[:ends]).backward()
            with torch.no_grad():
                testing.call(case, "triton")
    assert len(given) > 40 and all(len(patterns) == 1 for patterns in given.values())


@pytest.mark.usefixtures("interpreter")
def test_half_precision():
    check(testing.random_inputs(MECHANISMS["nesterov"], T=18, B=1, H=1, Hv=1, dk=16, dv=16), 3e-3, torch.float16)


@pytest.mark.usefixtures("interpreter")
def test_a_sequence_full_of_nan_spoils_no_neighbour():
    case = testing.random_inputs(MECHANISMS["momentum, gated"], T=18, B=3, H=1, Hv=1, dk=16, dv=16)
    case = in_dtype(testing.pack(case, [18, 3, 9]), torch.float32)
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for name, t in nan.items():
        if name != "log_decay":  # of which a NaN is refused on the CPU
            t[:, 18:21] = float("nan")
    clean = testing.evaluate(case, "triton")
    for what, got in testing.evaluate(replace(case, tensors=nan), "triton").items():
        sequences = len(got) == 3
        for kept in ([0], [2]) if sequences else (slice(0, 18), slice(21, 30)):
            assert torch.equal(*(x[kept] if sequences else x[:, kept] for x in (got, clean[what]))), what


@pytest.mark.usefixtures("interpreter")
def test_a_second_derivative_is_refused():
    case = in_dtype(testing.random_inputs(MECHANISMS["momentum"], T=9, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    x = {name: t.requires_grad_() for name, t in case.tensors.items()}
    o, _ = testing.call(replace(case, tensors=x), "triton")
    (first,) = torch.autograd.grad(o.square().sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


class Call(torch.nn.Module):
    """The outputs and the states of a call, as a function of its tensors."""

    def __init__(self, case: testing.Inputs):
        super().__init__()
        self.case = case

    def forward(self, tensors):
        o, state = testing.call(replace(self.case, tensors=tensors), "triton")
        return o, state.weights["W"], state.slots["momentum"]["W"]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["momentum, gated", "dot, read before"])
def test_traced_whole(name):
    case = in_dtype(testing.random_inputs(MECHANISMS[name], T=17, B=1, H=1, Hv=1, dk=16, dv=16, state=False), torch.float32)
    tensors = {name: t.requires_grad_() for name, t in case.tensors.items()}
    eager = Call(case)(tensors)
    compiled = torch.compile(Call(case), fullgraph=True, backend="aot_eager")(tensors)
    exported = torch.export.export(Call(case), (tensors,), strict=False).module()(tensors)
    for got in (compiled, exported):
        torch.testing.assert_close(got, eager)
    sums = (sum(x.square().sum() for x in out) for out in (compiled, eager))
    for a, b in zip(*(torch.autograd.grad(x, list(tensors.values())) for x in sums), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("interpreter")
def test_the_operators_keep_their_contract():
    """Fakes of the right sizes for every way to call them."""
    q, v = torch.randn(1, 5, 1, 16), torch.randn(1, 5, 2, 32)
    numbers, first = torch.rand(10, 1, 5, 2), torch.randn(1, 2, 2, 16, 32)
    for erase, save in ((True, True), (False, True), (True, False)):
        args = q, q, v, numbers, first, None, 0.25, erase, False, save
        library.opcheck(torch.ops.ttr.two_slots_forward.default, args, test_utils=("test_schema", "test_faketensor"))
    _, last, *saved = torch.ops.ttr.two_slots_forward.default(q, q, v, numbers, first, None, 0.25, True, False, True)
    args = v, last, q, q, v, numbers, first, None, saved, 0.25, True, False
    library.opcheck(torch.ops.ttr.two_slots_backward.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (declare(steps=2), "one step a token"),
        (declare(gate="vector"), "a slot beside the weights, and a gate"),
        (declare(step={"map": "sigmoid", "per": "key"}), "a slot beside the weights, and a gate, a step"),
        (declare(momentum={"map": "sigmoid", "per": "value"}), "momentum is per value"),
    ],
)
def test_what_these_kernels_leave_to_one_event_at_a_time(spec, why):
    said = ttr.select_path(spec, path="triton", device="cuda")[1]
    assert said.startswith("a Triton kernel, one event at a time") and why in said


def test_heads_that_are_too_wide():
    for sizes in ({"dk": 256}, {"dv": 144}):
        with pytest.raises(ValueError, match="multiple of 16 up to 128"):
            ttr.select_path(MECHANISMS["momentum"], path="triton", device="cuda", **sizes)
    with pytest.raises(ValueError, match="the normaliser's channel pass 128; choose dv up to 112"):
        ttr.select_path(MECHANISMS["normalised"], path="triton", device="cuda", dv=128)


def test_many_slots_are_left_to_one_event_at_a_time(monkeypatch):
    monkeypatch.setattr(registry.OPTIMIZERS, "_classes", dict(registry.OPTIMIZERS._classes))
    body = {
        "linear": True,
        "slots": ("a", "b"),
        "__doc__": "A rule of a test.",
        "update": lambda self, z, g, s: (z[0] - s.step * g, z[2], z[1]),
    }
    cls = dataclass(frozen=True, kw_only=True)(type("Many", (ttr.Optimizer,), {**body, "__annotations__": {}}))
    spec = ttr.spec({"optimizer": ttr.optimizer("many")(cls)(), "objective": "l2"})
    assert "carries 2 more slots; the kernels over chunks carry one" in ttr.select_path(spec, path="triton", device="cuda")[1]


def test_decoding_does_not_take_the_kernel_of_one_state():
    from ttr.kernels.decode import step_of

    assert not step_of(MECHANISMS["momentum"]).fused


GPU = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and a process without TRITON_INTERPRET")
BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@GPU
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", MECHANISMS)
def test_on_the_gpu(name, dtype):
    case = testing.random_inputs(MECHANISMS[name], T=333, B=2, H=2, Hv=4, dk=64, dv=32, extreme=False, seed=len(name))
    check(case, BOUNDS[dtype], dtype, "cuda")


@GPU
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("dk", "dv", "T"), [(128, 128, 200), (96, 48, 65), (16, 112, 64), (128, 16, 1)])
def test_head_sizes_on_the_gpu(dk, dv, T, dtype):
    check(testing.random_inputs(MECHANISMS["momentum, gated"], T=T, B=1, H=1, Hv=2, dk=dk, dv=dv), BOUNDS[dtype], dtype, "cuda")


@GPU
def test_packed_on_the_gpu():
    lengths = [5, 0, 64, 1, 333, 0, 130, 65, 1]
    case = testing.pack(testing.random_inputs(MECHANISMS["momentum, gated"], T=333, B=9, H=1, Hv=2, dk=64, dv=64), lengths)
    check(case, BOUNDS[torch.bfloat16], torch.bfloat16, "cuda")


@GPU
def test_bitwise_the_same_from_run_to_run():
    case = in_dtype(testing.random_inputs(MECHANISMS["nesterov"], T=300, B=4, H=2, Hv=4, dk=128, dv=128), torch.bfloat16, "cuda")
    first = testing.evaluate(case, "triton")
    assert all(torch.equal(x, first[name]) for name, x in testing.evaluate(case, "triton").items())


def test_two_bytes_have_chunks_of_their_own():
    assert tiling_of(torch.bfloat16, "cuda") == tiling_of(torch.float16, "cuda") != tiling_of(torch.float32, "cuda")


def test_starts_are_one_program_a_head_where_heads_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(run.configs, "multiprocessors", lambda arch: 132)
    monkeypatch.setattr(run, "tiling_of", lambda dtype, device, full: tiling_of(dtype, "cuda", full))
    tiles = []
    for heads in (12, 6):  # of 8 sequences
        x = torch.empty(8, 64, heads, 128, dtype=torch.bfloat16, device="meta")
        tiles.append(run.kind_of(x, x, None, None, run.rule_of(True, False), None, True, False).tiling.starts.tile)
    assert tiles == [128, 64]
