"""Slots that neither the gradient nor the query sees cost the dual form no product."""

from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch

import ttr
from ttr import testing
from ttr.inner_optim import Optimizer
from ttr.kernels.torch import dual
from ttr.lowering import slots_seen


@dataclass(frozen=True, kw_only=True)
class LooksAheadOfLargeSteps(Optimizer):
    """A factor that is zero for steps up to one, and for every step that a sigmoid gives."""

    linear: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("momentum", "ignored")
    step: ttr.Signal = ttr.signal("sigmoid")

    def point(self, z, s):
        return z[0] + torch.relu(s.step - 1) * z[1]

    def read(self, z, s):
        return 0 * z[0] + s.step * z[1]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("delta", ((0,), (0,))),
        ("momentum", ((0,), (0,))),
        ({"kind": "momentum", "nesterov": True}, ((0, 1), (0,))),
        ("averaged", ((0,), (1,))),
        ("muon", ((0,), (0,))),
        ("adam", ((0,), (0,))),
    ],
    ids=str,
)
def test_which_slots_are_seen(optimizer, expected):
    assert slots_seen(ttr.spec({"regressor": "linear", "objective": "l2", "optimizer": optimizer}).optimizer) == expected


def test_a_factor_that_is_zero_over_a_stretch_is_seen():
    assert slots_seen(LooksAheadOfLargeSteps()) == ((0, 1), (1,))


def products(optimizer: dict) -> int:
    """Of one mini-batch of a SwiGLU memory, forward, what the optimizer itself multiplies left out."""
    spec = ttr.spec("lact", **{"optimizer": {"mini_batch": 4, "accumulate": True, **optimizer}, "gate": "none", "objective": "l2"})
    with mock.patch.object(dual, "product", wraps=dual.product) as product:
        testing.call(testing.random_inputs(spec, T=4, B=1, H=1, Hv=1), "dual")
    return product.call_count


def test_slots_that_are_not_seen_cost_no_product():
    """Three matrices: what keys and queries give, and the sum of outer products."""
    plain = products({"kind": "delta"})
    assert plain == 9
    assert products({"kind": "momentum"}) == products({"kind": "adam"}) == products({"kind": "muon"}) == plain
    assert products({"kind": "momentum", "nesterov": True}) == plain + 3


def test_what_is_in_them_is_not_seen_either():
    """An infinite momentum is the definition's NaN when it moves the weights, and no sooner."""
    spec = ttr.spec("titans", **{"optimizer.mini_batch": 4})
    given = testing.random_inputs(spec, T=4, B=1, H=1, Hv=1, dk=4, extreme=False)
    read_before = ttr.spec(spec, read={"at": "before"}, **{"optimizer.accumulate": True})
    given = testing.Inputs(read_before, given.tensors, given.params)
    _, state = testing.call(given.tokens(0, 1), "dual")
    state.slots["momentum"]["W1"].fill_(float("inf"))
    given = testing.Inputs(read_before, given.tokens(1, 4).tensors, given.params, state)
    torch.testing.assert_close(testing.call(given, "dual")[0], testing.call(given, "definition")[0])
