"""Robust objectives: their gradients as they are printed, and the forms that agree."""

from __future__ import annotations

import pytest
import torch

from ttr.inner_optim import Signals
from ttr.objectives import Huber, Lp


def slope(objective, error: torch.Tensor, **signals: float) -> torch.Tensor:
    s = Signals({name: torch.tensor(value, dtype=error.dtype) for name, value in signals.items()})
    return torch.func.grad(lambda p: objective.loss(p, torch.zeros_like(p), s))(error)


@pytest.fixture
def error() -> torch.Tensor:
    return torch.tensor([0.3, -0.8, 1.2, 0.0], dtype=torch.float64)


def test_huber_s_three_forms(error):
    inside, outside = float(error.norm()) + 0.1, 0.5
    for over in ("length", "mixture"):
        torch.testing.assert_close(slope(Huber(over=over), error, threshold=inside), error)
    torch.testing.assert_close(slope(Huber(), error, threshold=outside), error.clamp(-outside, outside))
    torch.testing.assert_close(slope(Huber(over="length"), error, threshold=outside), outside * error / error.norm())
    torch.testing.assert_close(slope(Huber(over="mixture"), error, threshold=outside), outside * error.sign())


@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_on_one_channel_they_are_one(threshold):
    for x in (-1.3, 0.2, 0.0):
        e, s = torch.tensor([x], dtype=torch.float64), Signals({"threshold": torch.tensor(threshold, dtype=torch.float64)})
        losses = [Huber(over=over).loss(e, torch.zeros_like(e), s) for over in ("channel", "length", "mixture")]
        assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("over", ["channel", "length", "mixture"])
def test_no_error_has_finite_gradients_of_every_order(over):
    zero = torch.zeros(3, dtype=torch.float64)
    s = Signals({"threshold": torch.tensor(0.5, dtype=torch.float64)})
    second = torch.func.hessian(lambda p: Huber(over=over).loss(p, zero, s))(zero)
    assert torch.isfinite(second).all()
    if over != "channel":  # whose |e| has no slope at 0
        torch.testing.assert_close(second, torch.eye(3, dtype=torch.float64))


def test_a_smooth_sign_is_the_gradient_and_is_differentiated_as_it_is(error):
    def expected(e):
        return torch.tanh(10 * e) * (e.square() + 1e-6)

    objective = Lp(p=3, smooth=1e-6, sign_scale=10.0)
    torch.testing.assert_close(slope(objective, error), expected(error))
    second = torch.func.jacrev(lambda e: slope(objective, e))(error)
    torch.testing.assert_close(second, torch.func.jacrev(expected)(error))
    none = Signals({})
    torch.testing.assert_close(objective.loss(error, torch.zeros_like(error), none), (error.square() + 1e-6).pow(1.5).sum() / 3)


def test_without_a_smooth_sign_the_gradient_is_the_loss_s_own(error):
    torch.testing.assert_close(slope(Lp(p=3), error), error.sign() * error.square())
    torch.testing.assert_close(slope(Lp(p=3, smooth=1e-2), error), error * (error.square() + 1e-2).sqrt())
