"""Several micro-steps a token: chunks of events that begin and end inside tokens, and of which one in n is read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

import ttr
from ttr import testing
from ttr.kernels.triton import configs, tune
from ttr.kernels.triton.scalar_gate.plan import Kind, Rule, forward_plan
from ttr.kernels.triton.shapes import Sizes

from . import direct
from .mechanisms import COUPLED, DELTA, SGD, definition

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6's own
]

BOUND = 2e-5
RULES = {
    "delta": ("l2", "none", "after"),
    "gated": ("l2", "scalar", "after"),
    "read before": ("l2", "scalar", "before"),
    "coupled": ("l2", COUPLED, "after"),
    "coupled, read before": ("l2", COUPLED, "before"),
    "added": ("dot", "scalar", "after"),
    "added, read before": ("dot", "scalar", "before"),
}


def spec_of(rule: str, steps: int, **optimizer):
    objective, gate, read = RULES[rule]
    kind = DELTA if objective == "l2" else SGD
    return ttr.spec(
        {"regressor": "linear", "objective": objective, "optimizer": {**kind, "steps": steps, **optimizer}, "gate": gate, "read": read}
    )


def inputs(rule: str, steps: int, lengths: int | list[int], **options) -> testing.Inputs:
    options = {"H": 1, "Hv": 1, "dk": 16, "dv": 16} | options
    if isinstance(lengths, int):
        return testing.random_inputs(spec_of(rule, steps), T=lengths, **({"B": 1} | options))
    return testing.pack(testing.random_inputs(spec_of(rule, steps), T=max(lengths), B=len(lengths), **options), lengths)


def check(case: testing.Inputs, segments: int = 1, bound: float = BOUND, **how) -> None:
    """d log_decay is a difference of sums of order one: where a gate forgets all it is zero, and an ulp of the sums remains."""
    case = direct.in_dtype(case, torch.float32)
    exact = definition(case)
    bounds = {name: bound / min(1.0, max(1e-6, float(x.abs().max()))) if name == "d log_decay" else bound for name, x in exact.items()}
    testing.assert_close(direct.evaluate(case, direct.config(**how), segments), exact, bounds, f"{how}, {segments} segments")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3])
def test_rules(rule, steps):
    """Chunks of 16 events: of 8 tokens, and of 5 1/3."""
    check(inputs(rule, steps, 13, Hv=2, seed=steps))


@pytest.mark.parametrize(("rule", "steps"), [("gated", 4), ("coupled, read before", 5), ("gated", 16), ("read before", 23)])
def test_any_number_of_steps(rule, steps):
    """A chunk of 16 events is four tokens, three and a part, one, less than one: chunks without any reader among them."""
    check(inputs(rule, steps, 5))


@pytest.mark.parametrize(
    ("steps", "chunk", "length"), [(2, 32, 1), (2, 32, 33), (2, 64, 40), (3, 32, 1), (3, 32, 11), (3, 64, 43), (4, 64, 17)]
)
def test_lengths(steps, chunk, length):
    """Where the readers of a whole chunk fill their tile (n = 2 and 32, 64; n = 4 and 64) and where they do not."""
    check(inputs("gated", steps, length, seed=length), chunk=chunk)


def test_the_definition_itself():
    """The other tests hold the kernels against the chunk path; here against the loop that says what is meant."""
    case = direct.in_dtype(inputs("coupled", 3, 7, H=1, Hv=2), torch.float32)
    got = testing.evaluate(case, "triton")
    testing.assert_close(got, testing.evaluate(case.to(torch.float64), "definition"), BOUND, "definition")


@pytest.mark.parametrize(("steps", "dk", "dv", "H", "Hv"), [(2, 48, 80, 1, 2), (3, 32, 16, 2, 4)])
def test_head_sizes_and_groups(steps, dk, dv, H, Hv):
    check(inputs("gated", steps, 9, H=H, Hv=Hv, dk=dk, dv=dv), tile=32)


@pytest.mark.parametrize(("rule", "steps"), [("gated", 3), ("added", 2)])
@pytest.mark.parametrize(("segments", "every"), [(2, 1), (3, 2)])
def test_segments_and_checkpoints(rule, steps, segments, every):
    """Seven or five chunks; a segment may begin inside a token."""
    check(inputs(rule, steps, 35), segments, every=every)


@pytest.mark.parametrize(("rule", "steps", "segments"), [("gated", 2, 1), ("coupled, read before", 3, 2), ("added", 3, 3)])
def test_packed(rule, steps, segments):
    """Sequences of no token, one token, and of fewer chunks than there are segments."""
    check(inputs(rule, steps, [3, 0, 1, 14]), segments)


@pytest.mark.parametrize("log_decay", [0.0, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout(log_decay):
    case = inputs("gated", 3, 12)
    check(replace(case, tensors={**case.tensors, "log_decay": torch.full_like(case.tensors["log_decay"], log_decay)}), segments=2)


def test_correlated_keys_without_a_state():
    case = inputs("delta", 2, 40, dk=32, correlation=0.9, extreme=False, state=False)
    case32 = direct.in_dtype(case, torch.float32)
    own = max(testing.errors(testing.evaluate(case32, {"kind": "chunk", "chunk_size": 64}), definition(case32)).values())
    check(case, chunk=64, bound=max(BOUND, 4 * own))


def test_a_sequence_full_of_nan_spoils_no_neighbour():
    case = direct.in_dtype(inputs("gated", 3, [7, 9, 5]), torch.float32)
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for t in nan.values():
        t[:, 7:16] = float("nan")
    clean = direct.evaluate(case, direct.config(), 2)
    for what, got in direct.evaluate(replace(case, tensors=nan), direct.config(), 2).items():
        others = [got[[0, 2]], clean[what][[0, 2]]] if len(got) == 3 else [torch.cat([x[:, :7], x[:, 16:]], 1) for x in (got, clean[what])]
        assert torch.equal(*others), f"{what} of a sequence changed with the tokens of another"


def test_no_token_reads_what_comes_later():
    """A NaN from token 8 on, in the middle of a chunk: the tokens before it do not see it, though their tile of readers holds it."""
    case = direct.in_dtype(inputs("gated", 3, 16), torch.float32)
    clean = direct.evaluate(case, direct.config(), gradients=False)["o"]
    for t in case.tensors.values():
        t[:, 8:] = float("nan")
    # a product with a chunk's events takes them all, the later ones times zero: whole chunks are clean, and so is what they read
    got = direct.evaluate(case, direct.config(), gradients=False)["o"]
    assert torch.equal(got[:, :5], clean[:, :5]) and got[:, 8:].isnan().all()


PUBLIC = {
    "gated, 2 steps": spec_of("gated", 2),
    "mean of squares": ttr.spec({"optimizer": {**DELTA, "steps": 2}, "objective": {"kind": "l2", "reduce": "mean"}, "gate": "scalar"}),
    "nlms": spec_of("gated", 3, step_rule="nlms"),
    "implicit": spec_of("coupled", 2, step_rule="implicit"),
    "constant step": ttr.spec({"optimizer": {"kind": "delta", "steps": 3, "step": 0.7}, "gate": "fixed"}),
    "constant nlms": ttr.spec({"optimizer": {"kind": "nlms", "steps": 2, "step": 0.7}}),
    "normalised": ttr.spec({"optimizer": {**SGD, "steps": 2}, "gate": "scalar", "read": {"normalizer": "sum"}}),
    "learned start": ttr.spec({"regressor": {"kind": "linear", "initial": "learned"}, "optimizer": {**DELTA, "steps": 2}}),
}


@pytest.mark.parametrize("name", [*PUBLIC, "deltaproduct", "gated_deltaproduct"])
def test_public_call(name):
    case = testing.random_inputs(PUBLIC.get(name, name), T=11, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False)
    testing.assert_close(testing.evaluate(case.to(torch.float32), "triton"), testing.evaluate(case, "chunk"), BOUND, name)


@pytest.mark.parametrize("shared", [("k",), ("v",), ("step",), ("k", "v", "step")], ids=str)
def test_what_has_no_micro_steps_repeats(shared):
    for rule in ("plain", "nlms"):
        case = testing.random_inputs(spec_of("gated", 2, step_rule=rule), T=9, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False)
        case = replace(case, tensors={n: t[:, :, 0] if n in shared else t for n, t in case.tensors.items()})
        testing.assert_close(testing.evaluate(case.to(torch.float32), "triton"), testing.evaluate(case, "chunk"), BOUND, rule)


def test_the_state_goes_on():
    """Packed, split at a token, and from path to path."""
    case = testing.random_inputs("gated_deltaproduct", T=12, B=2, dk=16, dv=16, extreme=False).to(torch.float32)
    whole = testing.evaluate(case, "chunk")
    testing.assert_close(testing.evaluate(case, "triton", splits=(5,)), whole, BOUND, "split")
    got = testing.evaluate(testing.pack(case, (12, 12)), "triton", gradients=False)
    testing.assert_close({"W": got["weights.W"]}, {"W": whole["weights.W"]}, BOUND, "packed")
    q = torch.randn(2, 0, 2, 16)
    o, state = ttr.regress(q, q, q, spec_of("delta", 2), step=q[..., 0], initial_state=whole["weights.W"], path="triton")
    assert o.shape == q.shape and torch.equal(state.weights["W"], whole["weights.W"])


def test_a_mixer_trains_along_the_kernels():
    sizes = {"head_dim": 16, "expand_k": 1.0, "expand_v": 1.0}
    torch.manual_seed(0)
    mixer, other = (ttr.Mixer(32, "gated_deltaproduct", path=path, **sizes) for path in ("triton", "chunk"))
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 19, 32)
    for m in (mixer, other):
        m(x).square().sum().backward()
    for (name, p), r in zip(mixer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-3, atol=1e-4, msg=name)


def raw(steps: int = 3, T: int = 7) -> tuple:
    """Arguments of the forward operator."""
    x = testing.random_inputs(spec_of("gated", steps), T=T, B=1, H=1, Hv=2, dk=16, dv=16, extreme=False).to(torch.float32)
    t = x.tensors
    return t["q"], t["k"], t["v"], t["log_decay"], t["step"], x.initial_state, None, 0.3, True, False, False, True, True


def test_opcheck():
    arguments = raw()
    check = partial(library.opcheck, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
    with direct.poisoned():
        check(torch.ops.ttr.scalar_gate_forward.default, arguments)
        o, last, saved = torch.ops.ttr.scalar_gate_forward.default(*arguments)
        assert o.shape == (1, 7, 2, 16)
        check(torch.ops.ttr.scalar_gate_backward.default, (o, last, *arguments[:7], saved, *arguments[7:11], True))


GATED, PRODUCT = spec_of("gated", 3), ttr.spec("gated_deltaproduct")


def run(q, k, v, step, log_decay) -> tuple[Tensor, Tensor]:
    o, state = ttr.regress(q, k, v, GATED, step=step, log_decay=log_decay, path="triton")
    return o, state.weights["W"]


def loss(given: list[Tensor], run=run) -> Tensor:
    o, W = run(*given)
    return (o * torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() + W.square().sum()


def arguments_of(T: int) -> list[Tensor]:
    q, k, v, log_decay, step, *_ = raw(T=T)
    return [x.detach().clone().requires_grad_() for x in (q, k, v, step, log_decay)]


@pytest.mark.filterwarnings("ignore")
def test_compile_fullgraph_with_dynamic_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (21, 18):
        given = arguments_of(T)
        got = torch.autograd.grad(loss(given, compiled), given)
        for x, y in zip(got, torch.autograd.grad(loss(given), given), strict=True):
            assert testing.relative_error(x, y) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")
def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, step, log_decay):
            return run(q, k, v, step, log_decay)

    arguments = tuple(x.detach() for x in arguments_of(16))
    T = torch.export.Dim("T", min=8, max=4096)
    program = torch.export.export(Layer(), arguments, dynamic_shapes=tuple({1: T} for _ in arguments))
    assert any("scalar_gate_forward" in str(node.target) for node in program.graph.nodes)
    other = tuple(x.detach() for x in arguments_of(21))
    for got, expected in zip(program.module()(*other), Layer()(*other), strict=True):
        assert torch.equal(got, expected)


def test_a_second_derivative_is_refused():
    given = arguments_of(7)
    (first,) = torch.autograd.grad(loss(given), given[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r"path='triton' has no second derivative; use path='chunk'"):
        first.sum().backward()


def test_a_gradient_of_the_state_alone():
    given = arguments_of(7)

    def used(path):
        q, k, v, step, log_decay = given
        _, state = ttr.regress(q, k, v, GATED, step=step, log_decay=log_decay, path=path)
        return torch.autograd.grad(state.weights["W"].square().sum(), [k, v, step, log_decay])

    for got, expected in zip(used("triton"), used("chunk"), strict=True):
        assert testing.relative_error(got, expected) < 1e-5


def test_tune_times_micro_steps():
    call = tune._Call(GATED, B=1, T=7, H=1, Hv=2, dk=16, dv=16, dtype=torch.float32, device=torch.device("cpu"))
    assert [x.shape[:3] for x in call.results(direct.config())[2:]] == [(1, 7, 1), (1, 7, 3), (1, 7, 3), (1, 7, 2), (1, 7, 3)]


def test_what_is_read_is_not_expanded():
    """Of n micro-steps one is read: outputs have T rows, and the kept pairs of who reads with whom as many."""
    kept = {}
    for steps in (1, 2, 3, 40):
        sizes = Sizes(N=1, T=100, tokens=100, H=1, HV=1, dk=64, dv=64, steps=steps)
        config = direct.config(chunk=64)
        kind = Kind(sizes, torch.bfloat16, 0, 3, 3, False, False, Rule(True, False, False), config, 1, 0)
        plan = forward_plan(kind, True, True)
        kept[steps] = {
            name: shape[0] for name, (_, shape, _) in plan.kept.places.items() if name in ("reads", "inverse", "error", "decays")
        }
        assert plan.whole.constants["R"] == {1: 64, 2: 32, 3: 32, 40: 16}[steps]
    assert {steps: x["reads"] for steps, x in kept.items()} == dict.fromkeys(kept, 100)
    assert all(x[name] == 100 * steps for steps, x in kept.items() for name in ("inverse", "error", "decays"))


def test_segments_follow_from_events():
    """On a GPU, without one: 16 heads, 16384 tokens of 2 events are cut as 32768 tokens are."""
    with FakeTensorMode():
        q = torch.empty(1, 16384, 16, 128, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, 16384, 2, 16, 128, dtype=torch.bfloat16, device="cuda")
        log_decay, step = (torch.empty(1, 16384, *micro, 16, device="cuda") for micro in ((), (2,)))
        o, state = ttr.regress(q, k, k, PRODUCT, step=step, log_decay=log_decay)
        assert o.shape == q.shape and o.dtype == q.dtype and state.weights["W"].shape == (1, 16, 128, 128)
        *_, saved = torch.ops.ttr.scalar_gate_forward.default(q, k, k, log_decay, step, None, None, 1.0, True, False, False, True, True)
        longer = configs.choose("sm_90", True, 128, 128, q.dtype, 16, 32768)
        assert longer.segments > 1
        pieces = longer.segments * 16 * 2 * 128 * 128 * 4  # states between segments and transfers
        kept = k.numel() + 3 * 16384 * 16 * longer.config.chunk  # the errors, two pairs of matrices a chunk, one of them read
        assert 1 < (saved.numel() - pieces) / (kept * q.itemsize) < 1.5
