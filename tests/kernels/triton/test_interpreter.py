"""The kernels in Triton's interpreter, in float32 on NaN-filled buffers, against the torch chunk path in float64."""

import itertools
import zlib
from dataclasses import replace

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.triton.configs import Launch

from .direct import config, evaluate, in_dtype, poisoned
from .mechanisms import MECHANISMS, definition, inputs

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6's own
]

BOUND = 2e-5
RAGGED = [5, 0, 1, 35]


def check(case: testing.Inputs, segments: int = 1, bound: float = BOUND, **how) -> None:
    """d log_decay is a difference of sums of order one: where a gate forgets all it is zero, and an ulp of the sums remains."""
    case = in_dtype(case, torch.float32)
    exact = definition(case)
    bounds = {name: bound / min(1.0, max(1e-6, float(x.abs().max()))) if name == "d log_decay" else bound for name, x in exact.items()}
    testing.assert_close(evaluate(case, config(**how), segments), exact, bounds, f"{how}, {segments} segments")


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    """Through `ttr.regress`: three chunks, two value heads a key head, an initial state, extreme gates, steps up to 2."""
    case = inputs(name, 35, B=1, H=1, Hv=2, dk=16, dv=16, seed=zlib.crc32(name.encode()))
    with poisoned():
        got = testing.evaluate(in_dtype(case, torch.float32), "triton")
    testing.assert_close(got, definition(in_dtype(case, torch.float32)), BOUND, name)


@pytest.mark.parametrize("name", ["mamba", "coupled, read before"])
@pytest.mark.parametrize(("chunk", "length"), [(16, 1), (16, 15), (16, 31), (32, 33), (32, 64), (32, 100)])
def test_lengths(name, chunk, length):
    check(inputs(name, length, B=1, H=1, Hv=1, dk=16, dv=16, seed=length), chunk=chunk)


@pytest.mark.parametrize(
    ("name", "dk", "dv", "H", "Hv"),
    [
        ("gated delta", 48, 80, 1, 2),
        ("mamba, read before", 80, 48, 2, 4),
        ("coupled", 32, 64, 2, 2),
        ("delta", 64, 16, 1, 3),
        ("gated delta", 96, 32, 1, 1),
    ],
)
def test_head_sizes_and_groups(name, dk, dv, H, Hv):
    check(inputs(name, 18, B=2 if Hv < 3 else 1, H=H, Hv=Hv, dk=dk, dv=dv, seed=dk), tile=32)


@pytest.mark.parametrize("name", ["mamba", "coupled, read before"])
@pytest.mark.parametrize(("readers", "keys"), [(32, 16), (16, 32)])
def test_readers_and_keys_of_other_tiles(name, readers, keys):
    """As `ttr.tune` tries them."""
    check(inputs(name, 35, B=1, H=1, Hv=1, dk=48, dv=16, seed=1), readers=Launch(readers, 4, 1), keys=Launch(keys, 4, 1))


@pytest.mark.parametrize("name", ["mamba", "gated delta"])
@pytest.mark.parametrize(("segments", "every"), list(itertools.product((1, 2, 3), (1, 2, 4))))
def test_segments_and_checkpoints(name, segments, every):
    """Five chunks in so many segments, a checkpoint at so many chunks: neither divides the other."""
    check(inputs(name, 70, B=1, H=1, Hv=1, dk=16, dv=16, seed=segments), segments, every=every)


def test_several_tiles_of_keys_and_of_values():
    check(inputs("gated delta", 70, B=1, H=1, Hv=1, dk=48, dv=32), 2, every=2)


@pytest.mark.parametrize("name", ["linear attention", "mamba, read before", "coupled"])
@pytest.mark.parametrize(("segments", "every"), [(1, 1), (1, 4), (3, 2)])
def test_packed(name, segments, every):
    """Sequences of no token, one token, and of fewer chunks than there are segments."""
    check(inputs(name, RAGGED, H=1, Hv=2, dk=16, dv=16, seed=segments), segments, every=every)


@pytest.mark.parametrize(("name", "segments"), [("retnet", 1), ("mamba", 2), ("delta", 1), ("nlms", 2)])
def test_no_initial_state(name, segments):
    check(inputs(name, 40, B=1, H=1, Hv=2, dk=16, dv=16, state=False), segments)


@pytest.mark.parametrize("name", ["delta", "gated delta", "coupled", "nlms"])
def test_correlated_keys(name):
    """Keys of correlation 0.9 with steps up to 2: where a Neumann series loses every digit. float32 loses some, too."""
    case = inputs(name, 100, B=1, H=1, Hv=1, dk=32, dv=16, correlation=0.9, extreme=False)
    own = testing.evaluate(in_dtype(case, torch.float32), {"kind": "chunk", "chunk_size": 64})
    own = max(testing.errors(own, definition(in_dtype(case, torch.float32))).values())
    check(case, chunk=64, bound=max(BOUND, 4 * own))


@pytest.mark.parametrize("name", ["mamba", "gated delta", "coupled, read before"])
@pytest.mark.parametrize("log_decay", [0.0, -30.0, -100.0, float("-inf")])
def test_one_gate_throughout(name, log_decay):
    case = inputs(name, 40, B=1, H=1, Hv=1, dk=16, dv=16)
    check(replace(case, tensors={**case.tensors, "log_decay": torch.full_like(case.tensors["log_decay"], log_decay)}), segments=2)


@pytest.mark.parametrize("name", ["gated delta", "coupled"])
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_beyond_two_keep_what_the_gate_forgets(name, sign):
    """exp(-1) a token is nothing over a segment of 100, but step |k|^2 past 2 grows what it overshoots: here by as much."""
    case = inputs(name, 200, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False)
    key = torch.zeros_like(case.tensors["k"])
    key[..., 0] = 2
    # |decay (1 - 4 step)| = 1 or |decay - 4 step| = 1, with a step past 2 (sign 1) or below 0
    growth = 1 + sign * torch.e if name == "gated delta" else 1 / torch.e + sign
    step = torch.full_like(case.tensors["step"], growth / 4)
    tensors = {"k": key, "step": step, "log_decay": torch.full_like(step, -1), "v": 1e-3 * case.tensors["v"]}
    check(replace(case, tensors=case.tensors | tensors), segments=2, bound=1e-4)


@pytest.mark.parametrize("name", ["mamba", "gated delta"])
def test_what_a_segment_forgets(name):
    """Two segments of 128 tokens with a decay of exp(-2): only the end of the first is felt in the second."""
    case = inputs(name, 256, B=1, H=1, Hv=1, dk=16, dv=16)
    check(replace(case, tensors={**case.tensors, "log_decay": torch.full_like(case.tensors["log_decay"], -2.0)}), segments=2)


@pytest.mark.parametrize("name", ["mamba", "gated delta"])
@pytest.mark.parametrize("log_decay", [-0.1, -1.0])
def test_little_is_not_nothing(name, log_decay):
    """One value and the initial state, and a segment later 2^-9 or 2^-92 of them, covered by nothing: right relative to itself."""
    case = inputs(name, 128, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False)
    value = torch.zeros_like(case.tensors["v"])
    value[:, 0] = 1
    case = replace(case, tensors={**case.tensors, "v": value, "log_decay": torch.full_like(case.tensors["log_decay"], log_decay)})
    got, exact = evaluate(in_dtype(case, torch.float32), config(), 2)["o"][:, 64:], definition(case)["o"][:, 64:]
    assert ((got - exact).norm() / exact.norm()) < 1e-4 and exact.norm() > 0


@pytest.mark.parametrize(("name", "lengths"), [("mamba", 112), ("gated delta", [16, 96, 40])], ids=str)
def test_every_head_forgets_in_a_chunk_of_its_own(name, lengths):
    """Seven chunks, two segments: what is felt at a segment's end, or its start in backward, differs from head to head."""
    rows = {"B": 1} if isinstance(lengths, int) else {}
    case = inputs(name, lengths, **rows, H=1, Hv=7, dk=16, dv=16, extreme=False)
    log_decay = torch.zeros_like(case.tensors["log_decay"])
    for head in range(7):
        log_decay[:, 16 * head + 5 :: 112, head] = -100.0
    check(replace(case, tensors={**case.tensors, "log_decay": log_decay}), segments=2)


def test_a_step_that_is_no_number_is_not_forgotten():
    """A gate of exp(-2) makes nothing of what the first segment began with; 0 * NaN stays NaN all the same."""
    case = in_dtype(inputs("gated delta", 256, B=1, H=1, Hv=1, dk=16, dv=16, extreme=False), torch.float32)
    case.tensors["log_decay"].fill_(-2.0)
    case.tensors["step"][:, 3] = float("nan")
    o = evaluate(case, config(), 2)["o"]
    assert torch.isnan(o[:, 3:]).all()


@pytest.mark.parametrize(("name", "segments"), [("mamba", 1), ("gated delta", 2)])
def test_a_sequence_full_of_nan_spoils_no_neighbour(name, segments):
    lengths = [7, 9, 5]
    case = in_dtype(inputs(name, lengths, H=1, Hv=1, dk=16, dv=16), torch.float32)
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for t in nan.values():
        t[:, 7:16] = float("nan")
    clean = evaluate(case, config(every=2), segments)
    for what, got in evaluate(replace(case, tensors=nan), config(every=2), segments).items():
        others = [got[[0, 2]], clean[what][[0, 2]]] if len(got) == 3 else [torch.cat([x[:, :7], x[:, 16:]], 1) for x in (got, clean[what])]
        assert torch.equal(*others), f"{what} of a sequence changed with the tokens of another"


def test_no_gradient_drifts_along_a_sequence():
    """Nothing is forgotten here: where backward rounds the states it makes again otherwise than forward rounded its own, dq ends at
    twice the error that it begins with, and grows with the root of the length."""
    T, generator = 1024, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 1, 16, generator=generator) for _ in "qkv")
    k = torch.nn.functional.normalize(k, dim=-1)
    given = [x.half() for x in (q, k, v)] + [torch.rand(1, T, 1, generator=generator)]
    upstream = torch.randn(1, T, 1, 16, generator=generator)

    def gradients(given: list[torch.Tensor], path: str) -> tuple[torch.Tensor, ...]:
        q, k, v, step = leaves = [x.clone().requires_grad_() for x in given]
        o, _ = ttr.regress(q, k, v, "deltanet", step=step, scale=0.3, path=path)  # no power of two: it rounds
        return torch.autograd.grad(o, leaves, upstream.to(o.dtype))

    exact = gradients([x.double() for x in given], "chunk")
    for name, x, y in zip(("dq", "dk", "dv", "dstep"), gradients(given, "triton"), exact, strict=True):
        for part in (slice(0, T // 8), slice(T - T // 8, T)):
            error = (x.double() - y)[:, part].norm() / y[:, part].norm()
            assert error < 8e-4, f"{name} of tokens {part}: {error:.1e}"
