"""A window of pairs (the Omega rule): what it reduces to, how it is handed on, and where it has a dual form."""

from __future__ import annotations

import pytest
import torch

import ttr
from ttr import testing

BARE = {"q": [], "k": [], "v": [], "output": []}
MEMORIES = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "expansion": 2, "bias": True},
    "swiglu": {"kind": "mlp", "glu": True, "norm": "none", "residual": False},
}
WEIGHTS = {"learned": {"map": "sigmoid", "per": "window"}, "one": 1.0, "one each": {"value": 0.5, "per": "window"}}
SCHEDULES = {
    "delta": ({"kind": "delta"}, "after"),
    "momentum": ({"kind": "momentum"}, "before"),
    "averaged": ({"kind": "averaged"}, "after"),
    "summed": ({"kind": "momentum", "accumulate": True}, "before"),
    "adam": ({"kind": "adam", "step": 0.1, "eps": 1e-3, "accumulate": True}, "before"),
    "position": ({"kind": "delta", "position": "mean"}, "after"),
    "mirror": ({"kind": "delta", "mirror": "softmax"}, "after"),
}


def declare(memory="mlp", optimizer=None, read="after", window=3, weight="learned", gate="scalar", **more):
    return ttr.spec({
        "regressor": MEMORIES[memory], "objective": {"kind": "l2", "window": window, "window_weight": WEIGHTS[weight]},
        "optimizer": {**(optimizer or {"kind": "delta"}), **more}, "read": read,
        "gate": {"kind": "scalar", "order": "coupled"} if gate == "scalar" else gate, "layer": BARE,
    })  # fmt: skip


def inputs(spec, T=11, **more):
    """Steps that are small for the sum of several gradients."""
    case = testing.random_inputs(spec, T=T, dk=3, dv=3, extreme=False, **more)
    return testing.replace(case, tensors={name: 0.2 * t if name == "step" else t for name, t in case.tensors.items()})


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("window", "weight"), [(3, "learned"), (6, "one"), (2, "one each")])
def test_dual(memory, schedule, window, weight):
    """Shorter and longer than the mini-batch: the dual form is the definition, handed on inside a mini-batch too."""
    optimizer, read = SCHEDULES[schedule]
    gate = "none" if schedule == "position" else "scalar"
    spec = declare(memory, optimizer, read, window, weight, gate, mini_batch=4)
    assert ttr.select_path(spec)[0] == "dual"
    case = inputs(spec)
    expected = testing.evaluate(case, "definition")
    for path, splits in (("dual", ()), ("dual", (3, 6, 7)), ("definition", (1, 6))):
        testing.assert_close(testing.evaluate(case, path, splits=splits), expected, 1e-9, f"{spec.to_dict()} {path} {splits}")


@pytest.mark.parametrize("mini_batch", [1, 4])
def test_packed_sequences_do_not_look_into_each_other(mini_batch):
    spec = declare(mini_batch=mini_batch)
    case = inputs(spec, T=7, B=2)
    o, state = testing.call(testing.pack(case, [7, 2]))
    for i, (start, length) in enumerate([(0, 7), (7, 2)]):
        alone = testing.Inputs(spec, {n: t[i : i + 1, :length] for n, t in case.tensors.items()}, case.params)
        expected, own = testing.call(alone, "definition")
        torch.testing.assert_close(o[:, start : start + length], expected)
        torch.testing.assert_close(state.mini_batch["window"]["k"][i], own.mini_batch["window"]["k"][0])
    assert state.mini_batch["window"]["real"].tolist() == [[[1, 1]] * 2, [[1, 1]] * 2]


@pytest.mark.parametrize("mini_batch", [1, 4])
def test_decode_is_regress(mini_batch):
    spec = declare(mini_batch=mini_batch)
    case = inputs(spec, T=6)
    whole, end = testing.call(case)
    _, state = testing.call(case.tokens(0, 2))
    state = state.detach().clone()
    for t in range(2, 6):
        given = {name: x[:, t] for name, x in case.tensors.items()}
        o = ttr.decode(given.pop("q"), given.pop("k"), given.pop("v"), spec, state, params=case.params, **given)
        torch.testing.assert_close(o, whole[:, t])
    flat = (torch.utils._pytree.tree_flatten(s)[0] for s in (state, end))
    for a, b in zip(*flat, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mini_batch", [1, 4])
def test_r28_older_pairs_without_weight_are_the_online_rule(mini_batch):
    """A window whose weights are 1, 0, 0 is no window, outputs and weights; nor is a window of one declared differently."""
    spec, online = declare(mini_batch=mini_batch), declare(window=1, weight="one", mini_batch=mini_batch)
    assert online == ttr.spec(online, objective="l2")
    case = inputs(spec)
    weight = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand_as(case.tensors["window_weight"])
    o, state = testing.call(testing.replace(case, tensors=case.tensors | {"window_weight": weight}))
    without = {name: t for name, t in case.tensors.items() if name != "window_weight"}
    expected, same = testing.call(testing.replace(case, spec=online, tensors=without))
    torch.testing.assert_close(o, expected)
    for name, w in same.weights.items():
        torch.testing.assert_close(state.weights[name], w)


def test_r28_the_linear_recurrence():
    """On a matrix: W_t = (alpha - step sum gamma k k^T) W_{t-1} + step sum gamma k v^T."""
    spec = declare("linear")
    case = inputs(spec, T=6, B=1, H=1, Hv=1)
    _, state = testing.call(case)
    x = {name: t[0, :, 0] for name, t in case.tensors.items()}
    W = case.initial_state[0, 0]
    for t in range(6):
        A, B = x["log_decay"][t].exp() * torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
        for lag in range(min(3, t + 1)):
            weight = x["step"][t] * x["window_weight"][t, lag]
            k, v = x["k"][t - lag], x["v"][t - lag]
            A, B = A - weight * torch.outer(k, k), B + weight * torch.outer(k, v)
        W = A @ W + B
    torch.testing.assert_close(state.weights["W"][0, 0], W)


def test_many_steps_on_every_pair_solve_the_least_squares_problem():
    """Three pairs said again and again, all of them in the window: gradient descent on their whole loss."""
    spec = declare("linear", weight="one", gate="none")
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 3, 1, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    longest = torch.linalg.eigvalsh(k[0, :, 0].mT @ k[0, :, 0])[-1]
    again = (x.repeat(1, 600, 1, 1) for x in (k, k, v))
    _, state = ttr.regress(*again, spec, step=1 / float(longest))
    expected = torch.linalg.lstsq(k[0, :, 0], v[0, :, 0]).solution
    torch.testing.assert_close(state.weights["W"][0, 0], expected, rtol=1e-4, atol=1e-4)


def test_where_there_is_no_dual_form_the_reason_is_said():
    assert ttr.select_path(declare("linear"))[1].endswith("objective.window=3 takes the gradient of several pairs at once")
    nesterov = declare(optimizer={"kind": "momentum", "nesterov": True}, mini_batch=4)
    assert "takes gradients elsewhere than at the weights: the window's pairs would each have several" in ttr.select_path(nesterov)[1]


REFUSED = {
    "window": ({"window": 0}, {}, "objective.window=0: expected at least 1"),
    "weight without window": ({"window_weight": "sigmoid"}, {}, "objective.window_weight weighs the pairs of a window"),
    "weight per head": ({"window": 3, "window_weight": "sigmoid"}, {}, "objective.window_weight.per='head'.*use per window"),
    "steps": ({"window": 3}, {"optimizer": {"kind": "delta", "steps": 2}}, "needs optimizer.steps=1, got 2"),
    "step rule": ({"window": 3}, {"optimizer": "nlms"}, "needs optimizer.step_rule='plain', got 'nlms'"),
    "normaliser": ({"window": 3}, {"read": {"normalizer": "sum"}}, "needs read.normalizer='none', got 'sum'"),
    "two keys": ({"window": 3}, {"optimizer": {"kind": "delta", "write_key": "separate"}}, "needs optimizer.write_key='same'"),
    "least squares": ({"window": 3}, {"regressor": "least_squares", "optimizer": "cg"}, "regressor='least_squares' takes none"),
    "step per window": ({"window": 3}, {"optimizer": {"kind": "delta", "step": {"per": "window"}}}, "a step has no pairs to choose from"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    objective, more, words = REFUSED[name]
    with pytest.raises(ttr.SpecError, match=words):
        ttr.spec({"optimizer": "delta", "objective": {"kind": "l2", **objective}, **more})


def test_weights_of_the_wrong_shape_are_named():
    case = inputs(declare())
    wrong = testing.replace(case, tensors=case.tensors | {"window_weight": case.tensors["window_weight"][..., :2]})
    with pytest.raises(
        ValueError, match=r"window_weight: got shape .* expected \[2, 11, 2, 3\] \(per window: the token's own pair, then those before it\)"
    ):
        testing.call(wrong)


def test_explained():
    e = ttr.explain("omeganet", d_model=64)
    assert any("Σᵢ ωₜᵢ ∂ℓ(f(kᵢ; W), vᵢ)/∂W" in line and "t - 16 < i ≤ t" in line for line in e.recurrence)


def test_without_momentum_it_is_omeganet():
    """Heavy ball over a window at momentum 0 is the same step."""
    plain = declare(mini_batch=4)
    case = inputs(plain)
    heavy = declare(optimizer={"kind": "momentum"}, mini_batch=4)
    still = case.tensors | {"momentum": torch.zeros_like(case.tensors["step"])}
    o, state = testing.call(testing.replace(case, spec=heavy, tensors=still))
    expected, same = testing.call(case)
    torch.testing.assert_close(o, expected)
    for name, w in same.weights.items():
        torch.testing.assert_close(state.weights[name], w)


def test_newton_schulz_on_every_momentum_is_handed_on_by_the_definition():
    """Atlas's update can be said, and has no faster path: N and the pairs are in the state."""
    spec = declare(optimizer={"kind": "muon", "step": 0.1, "eps": 1e-2}, mini_batch=4)
    path, why = ttr.select_path(spec)
    assert path == "definition" and "optimizer 'muon' is not linear and steps at every token" in why
    case = inputs(spec, T=8)
    testing.assert_close(testing.evaluate(case, splits=(3, 5)), testing.evaluate(case), 1e-9, "split")
