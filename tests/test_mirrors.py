"""Mirrors: weights that predict as a map of those that are stored. What they reduce to, and where they have a dual form."""

from __future__ import annotations

import pytest
import torch

import ttr
from ttr import testing
from ttr.inner_optim import NoMirror, Norm, Softmax

BARE = {"q": [], "k": [], "v": [], "output": []}
MEMORIES = {
    "linear": {"kind": "linear", "initial": "learned"},
    "mlp": {"kind": "mlp", "expansion": 2, "bias": True},
    "swiglu": {"kind": "mlp", "glu": True, "norm": "none", "residual": False},
}
MIRRORS = {
    "norm": {"kind": "norm", "q": 4},
    "norm below two": {"kind": "norm", "q": 1.5},
    "softmax": {"kind": "softmax"},
    "softmax of outputs": {"kind": "softmax", "over": "outputs"},
}
SCHEDULES = {
    "sgd": ({"kind": "sgd", "step": "sigmoid"}, "after"),
    "momentum": ({"kind": "momentum"}, "after"),
    "averaged": ({"kind": "averaged"}, "before"),
    "position": ({"kind": "delta", "position": "mean"}, "after"),
    "adam": ({"kind": "adam", "step": 0.1, "eps": 1e-3, "accumulate": True}, "before"),
}


def declare(memory="mlp", optimizer=None, read="after", gate="scalar", **more):
    gate = {"kind": "scalar", "order": "coupled"} if gate == "scalar" else gate
    optimizer = {"kind": "sgd", "step": "sigmoid", **(optimizer or {}), **more}
    return ttr.spec({"regressor": MEMORIES[memory], "objective": "l2", "optimizer": optimizer, "gate": gate, "read": read, "layer": BARE})


def inputs(spec, T=11, **more):
    """Weights that are forgotten altogether have no norm to divide by, and large steps diverge: ordinary gates, small steps."""
    case = testing.random_inputs(spec, T=T, dk=3, dv=3, extreme=False, state=False, **more)
    small = {name: 0.1 * t if name == "step" else t for name, t in case.tensors.items()}
    return testing.replace(case, tensors=small)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("mirror", MIRRORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dual(memory, mirror, schedule):
    """The dual form is the definition: outputs, state, every gradient, and handed on inside a mini-batch."""
    optimizer, read = SCHEDULES[schedule]
    gate = "none" if schedule == "position" else "scalar"
    spec = declare(memory, optimizer, read, gate, mini_batch=4, mirror=MIRRORS[mirror])
    assert ttr.select_path(spec)[0] == "dual"
    case = inputs(spec)
    expected = testing.evaluate(case, "definition")
    for splits in ((), (3, 6, 7)):
        testing.assert_close(testing.evaluate(case, "dual", splits=splits), expected, 1e-9, f"{spec.to_dict()} {splits}")
    testing.assert_close(testing.evaluate(case, "definition", splits=(2, 5)), expected, 1e-9, "definition split")


def test_where_there_is_no_dual_form_the_reason_is_said():
    online = declare("linear", mirror="norm")
    assert ttr.select_path(online) == (
        "definition",
        "token by token through torch.func.grad: mirror 'norm' maps the weights before they predict",
    )
    elsewhere = declare(optimizer={"kind": "momentum", "nesterov": True}, mini_batch=4, mirror="softmax")
    assert "takes gradients elsewhere than at the weights: mirror 'softmax' would map" in ttr.select_path(elsewhere)[1]
    summed = declare(optimizer={"kind": "averaged", "accumulate": True}, read="before", mini_batch=4, mirror="norm")
    assert "optimizer 'averaged' reads elsewhere than at the weights: mirror 'norm'" in ttr.select_path(summed)[1]
    for spec in (online, elsewhere, summed):
        with pytest.raises(ValueError, match="cannot serve this declaration"):
            ttr.select_path(spec, path="dual" if spec.mini_batch != 1 else "chunk")


@pytest.mark.parametrize("shape", [(3, 5), (4,)])
def test_the_maps(shape):
    A = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Norm(q=4)(A), A / A.pow(4).sum().sqrt())
    torch.testing.assert_close(Norm(q=3)(A), A / A.abs().pow(3).sum() ** (1 / 3))
    assert torch.equal(Norm(q=2)(A), A) and torch.equal(NoMirror()(A), A)
    for over, axis in (("inputs", 0), ("outputs", -1)):
        W = Softmax(over=over)(A)
        assert (W > 0).all()
        torch.testing.assert_close(W.sum(axis), torch.ones_like(W.sum(axis)))
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(Norm(q=4)(zero).sum(), zero)
    assert torch.equal(Norm(q=4)(zero), zero) and torch.isfinite(slope).all()


def test_r30_a_norm_of_two_is_none():
    """MONETA at p = q = 2 is gradient descent with coupled decay: one declaration, one hash."""
    two, none = declare(mirror={"kind": "norm", "q": 2}), declare()
    assert two == none and two.hash == none.hash
    moneta = ttr.spec("moneta", **{"optimizer.mirror.q": 2, "objective": {"kind": "lp", "p": 2}})
    plain = ttr.spec("moneta", **{"optimizer.mirror": "none", "objective": "l2"})
    case = inputs(plain)
    got = testing.evaluate(testing.replace(case, spec=moneta))
    testing.assert_close(got, testing.evaluate(case), 1e-9, "moneta of two")


def test_kl_retention_that_keeps_all_and_learns_nothing_is_the_identity_on_the_simplex():
    spec = ttr.spec("memora")
    case = inputs(spec)
    still = {**case.tensors, "step": torch.zeros_like(case.tensors["step"]), "log_decay": torch.zeros_like(case.tensors["log_decay"])}
    _, state = testing.call(testing.replace(case, tensors=still))
    for name, A in state.weights.items():
        W = case.params[name].softmax(-2)
        torch.testing.assert_close(A.softmax(-2), W.expand_as(A))
        torch.testing.assert_close(W.log().softmax(-2), W)


def test_weights_stay_on_the_simplex_and_move():
    spec = ttr.spec("memora")
    case = inputs(spec)
    _, state = testing.call(case)
    for name, A in state.weights.items():
        W = spec.optimizer.mirror(A[0, 0])
        assert (W > 0).all() and (W - case.params[name][0].softmax(-2)).abs().max() > 1e-3


def test_gradients_are_taken_at_the_weights_that_predict():
    """One step by hand: the gradient at W = mirror(A), not through it, and the decay and step act on A."""
    spec = declare("linear", mirror={"kind": "norm", "q": 4})
    case = inputs(spec, T=1, B=1, H=1, Hv=1)
    _, state = testing.call(case)
    A = case.params["W"][0]
    W = A / A.pow(4).sum().sqrt()
    k, v = (case.tensors[n][0, 0, 0] for n in ("k", "v"))
    step, decay = (case.tensors[n][0, 0, 0] for n in ("step", "log_decay"))
    torch.testing.assert_close(state.weights["W"][0, 0], decay.exp() * A - step * torch.outer(k, k @ W - v))


def test_explained():
    lines = ttr.explain("moneta").recurrence
    assert any(line.startswith("norm: W = A / ||A||_q^(q - 2)") for line in lines)
    assert any("at W = norm(W⋆)" in line for line in lines) and "norm(Wₜ)" in lines[-1]
    matrix = ttr.explain(declare("linear", mirror="softmax")).recurrence
    assert matrix[-1].endswith("W = softmax(Wₜ))") and not any("eₜ" in line for line in matrix)
    assert "optimizer.mirror softmax (over inputs) instead of norm (eps 1e-06, q 4)" in str(
        ttr.explain(ttr.spec("moneta", **{"optimizer.mirror": "softmax"})).place
    )
