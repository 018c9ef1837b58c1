"""`ttr.detect_divergence`: silent unless asked for, and then it names the token or the argument."""

import pytest
import torch

import ttr
from ttr import testing

MLP = {
    "regressor": {"kind": "mlp", "norm": "none", "residual": False},
    "optimizer": {"kind": "delta", "step": "softplus"},
    "objective": "l2",
}


def case(spec, **options):
    return testing.random_inputs(spec, T=12, dk=4, dv=4, extreme=False, dtype=torch.float32, **options)


@pytest.mark.parametrize("schedule", [{}, {"mini_batch": 4}])
def test_a_step_too_large_is_named_by_its_token(schedule):
    given = case({**MLP, "optimizer": {**MLP["optimizer"], **schedule}})
    given.tensors["step"][:, 5:, 1] = 1e20
    o, _ = testing.call(given)
    first = int((~torch.isfinite(o)).nonzero()[:, 1].min())
    assert first >= 5
    with ttr.detect_divergence(), pytest.raises(FloatingPointError, match=rf"from token {first} on \(row 0, head 1\).*ttr.diagnose"):
        testing.call(given)
    testing.call(given)  # outside of it nothing is looked at


def test_the_token_is_named_also_where_a_chunk_spreads_it():
    """Inside a tile what one token brings reaches those before it: 0 times infinity."""
    q = 30 * torch.ones(1, 60, 1, 4)
    for path in ("recurrent", "chunk"):
        with ttr.detect_divergence(), pytest.raises(FloatingPointError, match=r"from token 10 on \(row 0, head 0\)"):
            ttr.regress(q, q, q, "deltanet", step=1.0, path=path)


@pytest.mark.parametrize("name", ["q", "k", "v", "step"])
def test_an_argument_that_is_not_finite_is_named(name):
    given = case("gated_deltanet")
    given.tensors[name][1, 7] = float("nan")
    with ttr.detect_divergence(), pytest.raises(FloatingPointError, match=rf"^{name}: token 7 \(row 1\)"):
        testing.call(given)


def test_a_state_that_is_not_finite_is_named():
    given = case("gated_deltanet")
    given.initial_state[0, 1, 2, 3] = float("inf")
    with ttr.detect_divergence(), pytest.raises(FloatingPointError, match=r"^initial_state: entry \[0, 1, 2, 3\]"):
        testing.call(given)


@pytest.mark.parametrize("name", ["gated_deltanet", "mesanet", "ttt_mlp", "softmax"])
def test_what_is_finite_passes_and_mixers_are_looked_into(name):
    mixer, x = ttr.Mixer(32, name), torch.randn(1, 6, 32)
    with ttr.detect_divergence():
        y = mixer(x)
        assert torch.equal(y, mixer(x))
        with pytest.raises((FloatingPointError, ValueError), match=r"NaN|not finite"):  # a gate refuses NaN by itself
            mixer(x * float("nan"))


def test_forgetting_everything_is_no_divergence():
    given = case("gated_deltanet")
    given.tensors["log_decay"][:, 3] = float("-inf")
    with ttr.detect_divergence():
        testing.call(given)
