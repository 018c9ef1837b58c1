"""The conformance table's column of the kernels, one row per preset that they serve: the definition, in float32."""

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.triton.eligible import why_not_triton

from .direct import in_dtype, poisoned

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6's own
]
SERVED = [name for name in ttr.presets() if why_not_triton(ttr.spec(name)) is None]


def case_of(name: str, T: int, B: int) -> testing.Inputs:
    """Two value heads a key head; mini-batches of 16 tokens, of which a few tokens make several."""
    spec = ttr.spec(name, **({"optimizer": {"mini_batch": 16}} if ttr.spec(name).mini_batch != 1 else {}))
    return testing.random_inputs(spec, T=T, B=B, H=1, Hv=2, dk=16, dv=16, correlation=0.2, extreme=spec.mini_batch == 1)


def check(case: testing.Inputs, what: str, splits: tuple[int, ...] = ()) -> None:
    """Torch's own path in float32 says what float32 loses."""
    case = in_dtype(case, torch.float32)
    expected = testing.evaluate(case.to(torch.float64), "definition")
    own = testing.errors(testing.evaluate(case, next(iter(testing.targets(case.spec))), splits), expected)
    with poisoned():
        got = testing.evaluate(case, "triton", splits)
    testing.assert_close(got, expected, {name: max(2e-5, 3 * error) for name, error in own.items()}, what)


def test_they_are_most():
    assert len(SERVED) >= 20


@pytest.mark.parametrize("name", SERVED)
def test_outputs_states_and_gradients(name):
    check(case_of(name, T=37, B=1), name)


@pytest.mark.parametrize("name", SERVED)
def test_packed(name):
    lengths = (19, 1, 6) if ttr.spec(name).mini_batch != 1 else (7, 1, 3)
    check(testing.pack(case_of(name, T=max(lengths), B=3), lengths), f"{name}, packed")


@pytest.mark.parametrize("name", SERVED)
def test_split(name):
    T = 20 if ttr.spec(name).mini_batch != 1 else 9
    check(case_of(name, T=T, B=1), f"{name}, in two pieces", splits=(4,))
