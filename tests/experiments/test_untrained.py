"""Untrained recall agrees with what each rule computes in closed form."""

import pytest
import torch

import ttr
from experiments.config import load
from experiments.tasks.untrained import recall_of_rule, unit_vectors, untrained_recall

LINEAR = {"regressor": "linear", "optimizer": {"kind": "sgd", "step": 1.0}, "read": {"scale": 1.0}}
DELTA = {"regressor": "linear", "optimizer": {"kind": "delta", "step": 1.0}, "read": {"scale": 1.0}}
RIDGE = {
    "regressor": {"kind": "least_squares", "weight": 1.0, "ridge": 0.01, "ridge_floor": 0.0},
    "optimizer": "cholesky",
}
SOFTMAX = {"regressor": "kernel", "read": {"scale": 8.0}}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    keys, values = unit_vectors(3, 12, 8, generator=generator), unit_vectors(3, 12, 8, generator=generator)
    return keys, values, torch.arange(12).expand(3, 12)


def test_linear_attention_answers_the_sum(data):
    keys, values, _ = data
    expected = keys @ (keys.transpose(1, 2) @ values)
    assert torch.allclose(recall_of_rule(ttr.spec(LINEAR), *data), expected, atol=1e-10)


def test_delta_answers_what_the_last_corrections_left(data):
    keys, values, _ = data
    memory = torch.zeros(3, 8, 8, dtype=torch.float64)
    for t in range(12):
        k, v = keys[:, t, :, None], values[:, t, None, :]
        memory = memory - k @ (k.transpose(1, 2) @ memory - v)
    assert torch.allclose(recall_of_rule(ttr.spec(DELTA), *data), keys @ memory, atol=1e-10)


def test_least_squares_answers_the_ridge_regression(data):
    keys, values, _ = data
    gram = keys.transpose(1, 2) @ keys + 0.01 * torch.eye(8, dtype=torch.float64)
    expected = keys @ torch.linalg.solve(gram, keys.transpose(1, 2) @ values)
    assert torch.allclose(recall_of_rule(ttr.spec(RIDGE), *data), expected, atol=1e-6)


def test_softmax_answers_the_kernel_average(data):
    keys, values, _ = data
    expected = (8 * keys @ keys.transpose(1, 2)).softmax(dim=-1) @ values
    # the question's own key carries exp(-8) beside exp(8)
    assert torch.allclose(recall_of_rule(ttr.spec(SOFTMAX), *data), expected, atol=1e-5)


def test_the_two_measures_rank_delta_and_linear_differently():
    rules = {"linear": LINEAR, "delta": DELTA, "ridge": RIDGE, "softmax": SOFTMAX}
    results = untrained_recall(rules, d=64, pairs=[64, 128], sequences=8, queries=64, seed=0)
    at = {(result.rule, result.pairs): result for result in results}
    # |error|^2 of the sum of n - 1 random values at random angles is (n - 1) / d
    assert at["linear", 128].relative_error == pytest.approx(127 / 64, rel=0.1)
    assert at["delta", 128].relative_error < at["linear", 128].relative_error
    assert at["delta", 128].retrieval < at["linear", 128].retrieval
    assert at["softmax", 128].retrieval == 1.0
    assert at["ridge", 64].relative_error < 0.1
    # a second value for every key: weighting all pairs alike cannot tell it from the first
    assert at["linear", 64].newest == pytest.approx(0.5, abs=0.1)
    assert at["delta", 64].newest > 0.8


def test_a_signal_without_a_number_is_refused():
    with pytest.raises(ValueError, match=r"untrained.rules.free: \['step'\] must be numbers"):
        untrained_recall({"free": {"optimizer": "delta"}}, d=8, pairs=[4], sequences=1, queries=1, seed=0)


def test_the_rules_of_the_recall_configuration_run():
    settings = load("recall").config.untrained
    assert settings is not None
    results = untrained_recall(settings.rules, d=16, pairs=[4], sequences=2, queries=2, seed=0)
    assert {result.rule for result in results} == set(settings.rules)
