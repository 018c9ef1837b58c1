"""The compiled kernels against float64, by the tolerance of the project: at most 1.5 times the error of an ideal 16-bit run.

The ideal run is low_precision.py's. What exceeds 1.5 is an expected failure with its ratio, up to a limit (LIMITS) past which
it fails. Compiling dominates: run it with -n 12.
"""

import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from ttr import testing
from ttr.kernels.triton.configs import arch_of, config_for, table

from . import direct, low_precision
from .mechanisms import MECHANISMS, definition, inputs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: test_interpreter.py and test_compile.py run without one"
)

MOST = 1.5  # of the root mean square
# How far a result may exceed MOST. The ideal run keeps the flows past a gate, dV and E in float32 where nothing multiplies
# them; here the gradients of gate and step come of dV, E, states and pairs rounded to 16 bits, and in fp16 a step is divided
# out of a dV that may be as small as fp16 goes. Nor are its triangular systems rounded, of which most error in fp16 comes.
# The worst are short: bf16 d step 2.2 (coupled, T 33) and fp16 d log_decay 4.1 (mamba, read before, T 33), 66 numbers each.
LIMITS = {
    torch.bfloat16: {"d log_decay": 4.0, "d step": 2.5, "rest": 1.6},
    torch.float16: {"d log_decay": 4.5, "d step": 5.0, "rest": 2.5},
    torch.float32: {"rest": MOST},
}
# of the largest error, which is a matter of luck, as the mean of a FEW numbers is; one wrong element is beyond luck
MOST_ANYWHERE, FEW = 5.0, 32
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RAGGED = [5, 0, 64, 1, 333, 0, 130, 65, 1]


def floor(dtype: torch.dtype) -> float:
    """An error this small is never too large: a sixteenth of an ulp, or what sums in float32 may lose.

    float32 products run as three tf32 ones (tf32x3), whose sums are truncated: measured up to 1.7e-6, where torch's
    float32 loses 2e-7 to 5e-7. So the kernels do not hold 1.5 times torch's float32; this is the bound that they hold.
    """
    return 1.5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 16


@contextmanager
def tolerance():
    """hold(case, dtype, run), as often as a test needs; what exceeds MOST within LIMITS makes the test an expected failure."""
    short: list[str] = []
    yield partial(hold, short)
    if short:
        pytest.xfail(f"over {MOST}: {'; '.join(short)}")


def hold(short: list[str], case: testing.Inputs, dtype: torch.dtype, run) -> None:
    case = direct.in_dtype(case, dtype, "cuda")
    exact = definition(case)
    parts = low_precision.parts(case, exact)
    own = low_precision.losses(low_precision.evaluate(case), exact, parts)
    got = low_precision.losses(run(case), exact, parts)
    for name in exact:
        mean, peak = (x / max(y, floor(dtype)) for x, y in zip(got[name], own[name], strict=True))
        luck = MOST / MOST_ANYWHERE
        excess = max(mean * (luck if exact[name].numel() < FEW else 1.0), peak * luck)
        told = f"{name} {mean:.2f} x the mean and {peak:.2f} x the largest error ({got[name][0]:.1e} against {own[name][0]:.1e})"
        assert excess <= LIMITS[dtype].get(name, LIMITS[dtype]["rest"]), told
        if excess > MOST:
            short.append(told)


def kernels(segments: int = 1):
    """On the row of the table, in so many segments."""

    def run(case: testing.Inputs) -> dict[str, torch.Tensor]:
        q, v, rule = case.tensors["q"], case.tensors["v"], direct.rule_of(case.spec)
        row = config_for(arch_of(q.device), rule.erase, q.shape[-1], v.shape[-1], q.dtype)
        return direct.evaluate(case, row, segments)

    return run


def public(case: testing.Inputs) -> dict[str, torch.Tensor]:
    return testing.evaluate(case, "triton")


@pytest.mark.parametrize("row", table()["sm_90"].rows, ids=str)
def test_every_row_of_the_table(row):
    """An odd length, two heads, an initial state; the rows of two bytes serve bf16 and fp16 alike."""
    with tolerance() as hold:
        name = "gated delta" if row.erase else "mamba, read before"
        case = inputs(name, 147, B=2, H=1, Hv=2, dk=row.dk, dv=row.dv, seed=row.dk + row.dv)
        config = table()["sm_90"].rows[row]
        hold(case, {2: torch.bfloat16, 4: torch.float32}[row.itemsize], lambda x: direct.evaluate(x, config, 1))
        if row.itemsize == 2 and row.dk == row.dv:
            hold(case, torch.float16, lambda x: direct.evaluate(x, config, 1))


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mechanism(name, dtype):
    """Through `ttr.regress`, which chooses configuration and segments."""
    with tolerance() as hold:
        hold(inputs(name, 333, H=2, Hv=4, dk=64, dv=32, seed=zlib.crc32(name.encode())), dtype, public)


@pytest.mark.parametrize("name", ["mamba", "gated delta", "gated deltaproduct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dk", "dv", "H", "Hv"), [(96, 128, 1, 3), (48, 80, 2, 4), (16, 112, 1, 1), (256, 96, 1, 2)])
def test_head_sizes_that_are_no_power_of_two(name, dtype, dk, dv, H, Hv):
    with tolerance() as hold:
        hold(inputs(name, 201, B=1, H=H, Hv=Hv, dk=dk, dv=dv, seed=dk), dtype, kernels())


@pytest.mark.parametrize("name", ["mamba, read before", "coupled", "deltaproduct", "coupled deltaproduct, read before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(name, dtype):
    with tolerance() as hold:
        for length in (1, 15, 31, 33, 63, 64, 65, 129, 511, 1000):
            hold(inputs(name, length, B=1, H=2, Hv=2, dk=64, dv=64, seed=length), dtype, kernels())


@pytest.mark.parametrize(
    "name", ["gated", "half steps", "delta", "gated delta", "coupled, read before", "deltaproduct", "gated deltaproduct"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_segments(name, dtype):
    """Also more segments than chunks."""
    with tolerance() as hold:
        case = inputs(name, 700, B=1, H=1, Hv=2, dk=64, dv=64, seed=7)
        for segments in (2, 3, 32):
            hold(case, dtype, kernels(segments))


@pytest.mark.parametrize("name", ["linear attention", "mamba", "delta", "nlms", "deltaproduct", "gated deltaproduct"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed(name, dtype):
    with tolerance() as hold:
        case = inputs(name, RAGGED, H=1, Hv=2, dk=64, dv=64, seed=3)
        for segments in (1, 3):
            hold(case, dtype, kernels(segments))
        hold(replace(case, initial_state=None), dtype, kernels(2))


@pytest.mark.parametrize("name", ["delta", "gated delta", "coupled", "nlms", "gated deltaproduct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correlated_keys(name, dtype):
    """Keys of correlation 0.9, steps up to 2: the triangular systems at their worst."""
    with tolerance() as hold:
        for seed in range(3):
            case = inputs(name, 300, B=1, H=2, Hv=2, dk=128, dv=64, correlation=0.9, extreme=False, seed=seed)
            hold(case, dtype, kernels())


@pytest.mark.parametrize("name", ["mamba", "gated delta", "coupled, read before", "gated deltaproduct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_gate_throughout(name, dtype):
    with tolerance() as hold:
        case = inputs(name, 150, B=1, H=2, Hv=2, dk=64, dv=64)
        for log_decay in (0.0, -1e-3, -30.0, -100.0, float("-inf")):
            same = torch.full_like(case.tensors["log_decay"], log_decay)
            hold(replace(case, tensors={**case.tensors, "log_decay": same}), dtype, kernels(2))


@pytest.mark.parametrize("name", ["mamba", "gated delta"])
@pytest.mark.parametrize("segments", [1, 3])
def test_a_sequence_full_of_nan_spoils_no_neighbour(name, segments):
    case = direct.in_dtype(inputs(name, [190, 210, 170], H=1, Hv=2, dk=64, dv=64), torch.bfloat16, "cuda")
    nan = {n: t.clone() for n, t in case.tensors.items()}
    for t in nan.values():
        t[:, 190:400] = float("nan")
    clean, run = kernels(segments)(case), kernels(segments)
    for what, got in run(replace(case, tensors=nan)).items():
        others = (
            [got[[0, 2]], clean[what][[0, 2]]] if len(got) == 3 else [torch.cat([x[:, :190], x[:, 400:]], 1) for x in (got, clean[what])]
        )
        assert torch.equal(*others), f"{what} of a sequence changed with the tokens of another"


@pytest.mark.parametrize("name", ["mamba, read before", "coupled, read before", "linear attention", "nlms", "deltaproduct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_bitwise(name, dtype):
    case = direct.in_dtype(inputs(name, RAGGED, H=2, Hv=4, dk=64, dv=64), dtype, "cuda")
    for segments in (1, 3):
        first, *others = (kernels(segments)(case) for _ in range(4))
        for other in others:
            for what in first:
                assert torch.equal(first[what], other[what]), f"{what}, {segments} segments"
