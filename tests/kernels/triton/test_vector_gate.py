"""One decay a key channel: the kernels in the interpreter, in float32 on NaN-filled buffers, against the chunk path in float64."""

import zlib
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import library

import ttr
from ttr import testing
from ttr.kernels.triton.configs import Launch
from ttr.kernels.triton.eligible import why_not_chunks
from ttr.kernels.triton.vector_gate import config as configuration
from ttr.kernels.triton.vector_gate import op

from .direct import in_dtype, poisoned

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's own

BOUND = 2e-5
RAGGED = [5, 0, 1, 35]
COUPLED = {"kind": "vector", "order": "coupled"}
SEPARATE = {"kind": "delta", "write_key": "separate"}


def declare(objective="l2", optimizer="delta", gate="vector", read="after"):
    return ttr.spec({"regressor": "linear", "objective": objective, "optimizer": optimizer, "gate": gate, "read": read})


MECHANISMS = {
    "gla": ttr.spec("gla"),
    "kda": ttr.spec("kda"),
    "rwkv7": ttr.spec("rwkv7"),
    "added, weighted": declare("dot", {"kind": "sgd", "step": "sigmoid"}),
    "added, read before": declare("dot", {"kind": "sgd", "step": 0.5}, read="before"),
    "added, a step a channel": declare("dot", {"kind": "sgd", "step": {"per": "key"}}),
    "unit steps": declare(optimizer={"kind": "delta", "step": 1.0}),
    "coupled": declare(gate=COUPLED),
    "read before": declare(read="before"),
    "coupled, read before": declare(gate=COUPLED, read="before"),
    "nlms": declare(optimizer={"kind": "nlms"}),
    "mean": declare({"kind": "l2", "reduce": "mean"}),
    "implicit, a step a channel": declare(optimizer={"kind": "implicit", "step": {"per": "key"}}),
    "a step a channel, no gate": declare(optimizer={"kind": "delta", "step": {"per": "key"}}, gate="none"),
    "separate, a gate a head": declare(optimizer=SEPARATE, gate="scalar"),
    "separate, coupled": declare(optimizer=SEPARATE, gate=COUPLED),
    "separate, mean, read before": declare({"kind": "l2", "reduce": "mean"}, {**SEPARATE, "step": {"per": "key"}}, read="before"),
    "separate, fixed gate": declare(optimizer=SEPARATE, gate="fixed"),
}
SOME = ("added, weighted", "coupled, read before", "rwkv7")


def inputs(name: str, lengths: int | list[int], **options) -> testing.Inputs:
    """Random arguments in float64: one length for every row, or the lengths of packed sequences."""
    spec = MECHANISMS[name]
    if isinstance(lengths, int):
        return testing.random_inputs(spec, T=lengths, **options)
    return testing.pack(testing.random_inputs(spec, T=max(lengths), B=len(lengths), **options), lengths)


def exact(case: testing.Inputs) -> dict[str, torch.Tensor]:
    return testing.evaluate(case.to(torch.float64), {"kind": "chunk", "chunk_size": 16})


def config(chunk: int = 16, reach: float = 40.0, tile: int = 16) -> configuration.Config:
    return configuration.Config(chunk, reach, *[Launch(tile, 4, 1)] * 10)


def evaluate(case: testing.Inputs, config: configuration.Config, segments: int = 1) -> dict[str, torch.Tensor]:
    """In this configuration, cut into so many segments."""
    choice = configuration.Choice(config, segments, segments if segments > 1 else 0)
    with mock.patch.object(op, "choose", lambda *_: choice), poisoned():
        return testing.evaluate(case, "triton")


def check(case: testing.Inputs, segments: int = 1, bound: float = BOUND, **how) -> None:
    """d log_decay is a difference of sums of order one: where a gate forgets all it is zero, and an ulp of the sums remains."""
    case = in_dtype(case, torch.float32)
    expected = exact(case)
    bounds = {name: bound / min(1.0, max(1e-6, float(x.abs().max()))) if name == "d log_decay" else bound for name, x in expected.items()}
    testing.assert_close(evaluate(case, config(**how), segments), expected, bounds, f"{how}, {segments} segments")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """As it is chosen: two chunks, two value heads a key head, an initial state, extreme gates, steps up to 2."""
    assert ttr.select_path(MECHANISMS[name], device="cuda")[0] == "triton"
    case = in_dtype(inputs(name, 33, B=1, H=1, Hv=2, dk=16, dv=16, seed=zlib.crc32(name.encode())), torch.float32)
    with poisoned():
        got = testing.evaluate(case, "triton")
    testing.assert_close(got, exact(case), BOUND, name)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("chunk", "length", "extreme"), [(16, 1, False), (16, 15, True), (16, 33, False), (32, 48, True), (64, 65, False)])
def test_lengths(name, chunk, length, extreme):
    """Pairs that meet in the middle of a chunk, and pairs that meet in rounds (extreme)."""
    check(inputs(name, length, B=1, H=1, Hv=1, dk=16, dv=16, seed=length, extreme=extreme), chunk=chunk)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "dk", "dv", "H", "Hv"), [
    ("kda", 48, 80, 1, 2), ("gla", 80, 48, 1, 1), ("rwkv7", 32, 16, 2, 2), ("coupled", 96, 32, 1, 1), ("added, a step a channel", 16, 32, 1, 3),
])  # fmt: skip
def test_head_sizes_and_groups(name, dk, dv, H, Hv):
    check(inputs(name, 18, B=1, H=H, Hv=Hv, dk=dk, dv=dv, seed=dk, extreme=False), tile=32)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("segments", "state"), [(2, True), (3, False)])
def test_segments(name, segments, state):
    """Five chunks in so many segments, two tiles of keys and of values."""
    check(inputs(name, 70, B=1, H=1, Hv=1, dk=32, dv=32, seed=segments, extreme=False, state=state), segments)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("segments", [1, 3])
def test_packed(name, segments):
    """Sequences of no token, one token, and of fewer chunks than there are segments."""
    check(inputs(name, RAGGED, H=1, Hv=1, dk=16, dv=16, seed=segments, extreme=segments == 1), segments)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["kda", "coupled", "nlms"])
def test_correlated_keys(name):
    """Keys of correlation 0.9 with steps up to 2: where a Neumann series loses every digit. float32 loses some, too."""
    case = inputs(name, 100, B=1, H=1, Hv=1, dk=32, dv=16, correlation=0.9, extreme=False)
    own = testing.evaluate(in_dtype(case, torch.float32), {"kind": "chunk", "chunk_size": 64})
    own = max(testing.errors(own, exact(in_dtype(case, torch.float32))).values())
    check(case, chunk=64, bound=max(BOUND, 4 * own))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("log_decay", [0.0, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout(name, log_decay):
    case = inputs(name, 24, B=1, H=1, Hv=1, dk=16, dv=16)
    check(replace(case, tensors={**case.tensors, "log_decay": torch.full_like(case.tensors["log_decay"], log_decay)}), segments=2)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", SOME)
def test_one_strong_channel_among_weak_ones(name):
    """A tile meets in the middle or in rounds for itself: both in one head."""
    case = inputs(name, 24, B=1, H=1, Hv=1, dk=32, dv=16, extreme=False)
    log_decay = case.tensors["log_decay"].clone()
    log_decay[:, 7, :, 20] = -100.0
    check(replace(case, tensors={**case.tensors, "log_decay": log_decay}))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("reach", [0.0, 1e9])
def test_either_way_gives_the_same(reach):
    """Gates of e^-0.5 at the most, all pairs in rounds and all in the middle."""
    check(inputs("kda", 32, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), reach=reach, chunk=32)


@pytest.mark.usefixtures("interpreter")
def test_little_is_not_nothing():
    """One value and the initial state, and a segment later 2^-92 of them, covered by nothing: right relative to itself."""
    case = inputs("kda", 128, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False)
    value = torch.zeros_like(case.tensors["v"])
    value[:, 0] = 1
    log_decay = torch.full_like(case.tensors["log_decay"], -1.0)
    case = in_dtype(replace(case, tensors={**case.tensors, "v": value, "log_decay": log_decay}), torch.float32)
    got, expected = evaluate(case, config(), 2)["o"][:, 64:], exact(case)["o"][:, 64:]
    assert ((got - expected).norm() / expected.norm()) < 1e-4 and expected.norm() > 0


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["gla", "rwkv7"])
def test_a_sequence_full_of_nan_spoils_no_neighbour(name):
    lengths = [7, 9, 5]
    case = in_dtype(inputs(name, lengths, H=1, Hv=1, dk=16, dv=16, extreme=False), torch.float32)
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for t in nan.values():
        t[:, 7:16] = float("nan")
    clean = evaluate(case, config())
    with mock.patch("ttr.kernels.arguments._check_decay"):  # which looks at gates where looking is free
        spoilt = evaluate(replace(case, tensors=nan), config())
    for what, got in spoilt.items():
        others = [got[[0, 2]], clean[what][[0, 2]]] if len(got) == 3 else [torch.cat([x[:, :7], x[:, 16:]], 1) for x in (got, clean[what])]
        assert torch.equal(*others), f"{what} of a sequence changed with the tokens of another"


@pytest.mark.usefixtures("interpreter")
def test_shapes_and_dtypes_of_the_decay():
    """A number, one a head, one a token and head, one of every channel: as the chunk path takes them; gradients in their dtype."""
    case = in_dtype(inputs("kda", 20, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False), torch.float32)
    q, k, v, step = (case.tensors[name] for name in ("q", "k", "v", "step"))
    for shape in ((2,), (1, 20, 2), (1, 20, 2, 16)):
        decay = torch.rand(shape).neg().requires_grad_()
        loss = [ttr.regress(q, k, v, case.spec, step=step, log_decay=decay, path=path)[0].square().sum() for path in ("triton", "chunk")]
        got, expected = (torch.autograd.grad(x, decay)[0] for x in loss)
        assert testing.relative_error(got, expected) < BOUND
    half = torch.rand(1, 20, 2, 16).neg().half().requires_grad_()
    o = ttr.regress(q, k, v, case.spec, step=step, log_decay=half, path="triton")[0]
    assert torch.autograd.grad(o.sum(), half)[0].dtype == torch.float16
    assert torch.equal(o, ttr.regress(q, k, v, case.spec, step=step, log_decay=half.float(), path="triton")[0])
    constant = ttr.regress(q, k, v, case.spec, step=step, log_decay=-0.5, path="triton")[0]
    assert testing.relative_error(constant, ttr.regress(q, k, v, case.spec, step=step, log_decay=-0.5, path="chunk")[0]) < BOUND


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "dk", "dv"), [("gla", 48, 16), ("kda", 80, 48), ("rwkv7", 48, 80)])
def test_heads_that_are_no_whole_tiles(name, dk, dv):
    """As the public call cuts them, far chunks among them: what lies behind a head's last channel is the next head's first."""
    case = in_dtype(testing.random_inputs(name, T=40, B=1, H=2, Hv=2, dk=dk, dv=dv), torch.float32)
    with poisoned():
        got = testing.evaluate(case, "triton")
    testing.assert_close(got, testing.evaluate(case.to(torch.float64), "chunk"), 1e-5, name)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "dk", "dv", "extreme"), [("rwkv7", 16, 16, False), ("rwkv7", 48, 32, True), ("kda", 32, 80, True)])
def test_fp16_in_the_interpreter(name, dk, dv, extreme):
    """In 16 bits tiles have 64 channels, which these heads do not fill."""
    case = in_dtype(inputs(name, 70, B=1, H=1, Hv=1, dk=dk, dv=dv, extreme=extreme), torch.float16)
    with poisoned():
        got = testing.evaluate(case, "triton")
    testing.assert_close(got, exact(case), 1e-2, "fp16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dk", "dv"), [(16, 16), (32, 64), (48, 80), (64, 32), (128, 128)])
@pytest.mark.parametrize(("erase", "added"), [(False, False), (True, False), (True, True)])
def test_no_tile_of_16_bits_is_narrower_than_64(dtype, dk, dv, erase, added):
    """Of channels; the scans of segments alone are in float32."""
    from ttr.kernels.triton.vector_gate import plan

    q, v = torch.empty(2, 200, 1, dk, dtype=dtype, device="meta"), torch.empty(2, 200, 1, dv, dtype=dtype, device="meta")
    config = configuration.config_of(dtype, dk, dv, erase, added)
    rule, log_decay = plan.rule_of(erase, added, False, False), torch.empty(2, 200, 1, dk, device="meta")
    with mock.patch.object(torch.Tensor, "get_device", lambda _: 0):
        made = plan.plan_of(plan.kind_of(q, v, log_decay, None, None, None, rule, config, 2, None), True, True, True)
    for bind in (made.forward, made.reverse):
        bind(False), bind(True)
    for bind in (made.prepare, made.prepare_far, made.rows, made.states, made.pairs, made.values, made.gradients, made.gradients_far):
        bind()
    for name, bound in made.bound.items():
        assert {x for n, x in bound.constants.items() if n in ("BK", "BV", "TILE", "C")} <= {64, 128}, name


def test_a_scan_takes_all_values_where_heads_fill_the_gpu():
    """Not where a sequence may be cut: torch.compile, which knows no number of heads, then makes room for segments."""
    many, few = (configuration.choose("sm_90", torch.bfloat16, 128, 128, True, False, heads, 16384) for heads in (96, 16))
    assert (many.config.forward.tile, many.segments, many.room) == (128, 1, 0)
    assert few.config.forward.tile == 64 and few.segments == few.room > 1
    assert configuration.choose("sm_90", torch.bfloat16, 128, 128, False, False, 96, 16384).config.forward.tile == 64  # no erase


@pytest.mark.usefixtures("interpreter")
def test_the_normaliser():
    spec = ttr.spec({"optimizer": "sgd", "gate": "vector", "read": {"normalizer": "sum"}})
    case = testing.random_inputs(spec, T=19, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False)
    testing.assert_close(testing.evaluate(case.to(torch.float32), "triton"), testing.evaluate(case, "chunk"), BOUND, "normalised")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("which", ["o", "state"])
def test_one_output_alone(which):
    case = in_dtype(inputs("rwkv7", 19, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    given = {name: t.requires_grad_() for name, t in case.tensors.items()}

    def used(path):
        o, state = testing.call(replace(case, tensors=given), path)
        return torch.autograd.grad((o if which == "o" else state.weights["W"]).square().sum(), list(given.values()), allow_unused=True)

    for name, got, expected in zip(given, used("triton"), used("chunk"), strict=True):
        expected = torch.zeros_like(given[name]) if expected is None else expected
        assert testing.relative_error(torch.zeros_like(given[name]) if got is None else got, expected) < BOUND, name


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["gla", "rwkv7"])
def test_backward_leaves_what_forward_kept(name):
    """Another one over the same graph finds the same."""
    case = inputs(name, 37, B=1, H=1, Hv=1, dk=16, dv=16).to(torch.float32)
    leaves = {n: x.requires_grad_() for n, x in case.tensors.items()}
    o, _ = testing.call(replace(case, tensors=leaves), "triton")
    first, second = (torch.autograd.grad(o.square().sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    for name, x, y in zip(leaves, first, second, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.usefixtures("interpreter")
def test_a_second_derivative_is_refused():
    case = in_dtype(inputs("kda", 16, B=1, H=1, Hv=1, dk=16, dv=16), torch.float32)
    x = {name: t.requires_grad_() for name, t in case.tensors.items()}
    o, _ = testing.call(replace(case, tensors=x), "triton")
    (first,) = torch.autograd.grad(o.square().sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gla", "rwkv7"])
def test_compile_fullgraph_with_dynamic_length(name):
    compiled = torch.compile(partial(ttr.regress, spec=MECHANISMS[name], path="triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for T in (21, 33):
        case = in_dtype(inputs(name, T, B=1, H=1, Hv=2, dk=16, dv=16, state=False), torch.float32)
        given = {n: t.requires_grad_() for n, t in case.tensors.items()}
        both = [f(**given)[0] for f in (compiled, partial(ttr.regress, spec=MECHANISMS[name], path="triton"))]
        for got, expected in zip(*(torch.autograd.grad(o.square().sum(), list(given.values())) for o in both), strict=True):
            torch.testing.assert_close(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore")
def test_export_and_operators():
    case = in_dtype(inputs("kda", 21, B=1, H=1, Hv=2, dk=16, dv=16, state=False, extreme=False), torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, step, log_decay):
            return ttr.regress(q, k, v, MECHANISMS["kda"], step=step, log_decay=log_decay, path="triton")[0]

    arguments = tuple(case.tensors[name] for name in ("q", "k", "v", "step", "log_decay"))
    expected = Layer()(*arguments)
    program = torch.export.export(Layer(), arguments)
    assert any("vector_gate_forward" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*arguments), expected)
    q, k, v, step, log_decay = arguments
    given = q, k, v, None, log_decay, step, None, None, 0.25, True, False, False
    with poisoned():  # what nobody writes of a buffer is the same every time, as it is compared, too
        library.opcheck(torch.ops.ttr.vector_gate_forward.default, (*given, True))
        o, _, kept = torch.ops.ttr.vector_gate_forward.default(*given, True)
        library.opcheck(torch.ops.ttr.vector_gate_backward.default, (o, None, *given[:8], kept, *given[8:], True))


@pytest.mark.usefixtures("interpreter")
def test_the_state_goes_from_path_to_path():
    case = in_dtype(inputs("kda", 30, B=1, H=1, Hv=2, dk=16, dv=16), torch.float32)
    whole = testing.evaluate(case, "triton")
    testing.assert_close(testing.evaluate(case, "triton", splits=(13,)), whole, BOUND, "split")
    state = case.initial_state
    for path, (a, b) in zip(("triton", "chunk"), ((0, 13), (13, 30)), strict=True):
        _, state = testing.call(replace(case.tokens(a, b), initial_state=state), path)
    assert testing.relative_error(state.weights["W"], whole["weights.W"]) < BOUND


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (declare("dot", {"kind": "sgd", "step": {"per": "value"}}), "step is per value"),
        (declare(optimizer={"kind": "delta", "steps": 2}), "optimizer.steps=2"),
        (declare(optimizer="momentum"), "a slot beside the weights"),
    ],
)
def test_what_these_kernels_leave_to_one_event_at_a_time(spec, why):
    assert why in (why_not_chunks(spec) or "")
