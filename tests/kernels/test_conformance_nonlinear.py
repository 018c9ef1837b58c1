"""The conformance table, rows with nonlinear memories, nonlinear optimizers and frozen-gradient mini-batches."""

from dataclasses import replace

import pytest
import torch

import ttr
from kernels.largest import Largest
from ttr import testing

BARE = {"q": [], "k": [], "v": [], "output": []}
MEMORIES = {
    "linear": {"kind": "linear"},
    "linear_learned": {"kind": "linear", "initial": "learned"},
    "ttt_linear": {"kind": "mlp", "depth": 1, "bias": True},
    "mlp": {"kind": "mlp", "depth": 2, "expansion": 2, "bias": True, "activation": "gelu_tanh"},
    "deep": {"kind": "mlp", "depth": 3, "expansion": 1.5, "norm": "none", "residual": False, "activation": "tanh"},
    "swiglu": {"kind": "mlp", "glu": True, "activation": "silu", "norm": "none", "residual": False, "bias": True},
}
RULES = {
    "sgd_dot": {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": "dot"},
    "delta": {"optimizer": "delta", "objective": "l2"},
    "delta_mean": {"optimizer": "delta", "objective": {"kind": "l2", "reduce": "mean"}},
    "huber": {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": {"kind": "huber", "threshold": 0.5}},
    "lp": {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": {"kind": "lp", "p": 3}},
    "huber_length": {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": {"kind": "huber", "threshold": 0.5, "over": "length"}},
    "huber_mixture": {
        "optimizer": {"kind": "sgd", "step": "sigmoid"},
        "objective": {"kind": "huber", "threshold": "softplus", "over": "mixture"},
    },
    "lp_smooth": {
        "optimizer": {"kind": "sgd", "step": "sigmoid"},
        "objective": {"kind": "lp", "p": 3, "smooth": 1e-6, "sign_scale": 10.0},
    },
    "momentum": {"optimizer": "momentum", "objective": "l2"},
    "nesterov": {"optimizer": {"kind": "momentum", "nesterov": True}, "objective": "l2"},
    "averaged": {"optimizer": "averaged", "objective": "l2"},
    "adam": {"optimizer": {"kind": "adam", "step": 0.1, "eps": 1e-3}, "objective": "l2"},
    "muon": {"optimizer": {"kind": "muon", "step": 0.3, "weight": "sigmoid", "eps": 1e-2}, "objective": "l2"},
}
GATES = ("none", "scalar", "vector", "weight_norm")


def declare(memory, rule, gate, order="first", read="after", **schedule):
    body = {**RULES[rule], "regressor": MEMORIES[memory], "gate": {"kind": gate, "order": order} if gate in ("scalar", "vector") else gate}
    optimizer = body["optimizer"]
    body["optimizer"] = {**({"kind": optimizer} if isinstance(optimizer, str) else optimizer), **schedule}
    return ttr.spec({**body, "read": read, "layer": BARE})


def split_matches(spec, path, T=11, bound=1e-9, against="definition", **inputs):
    case = testing.random_inputs(spec, T=T, B=2, dk=3, dv=3, **inputs)
    expected = testing.evaluate(case, against)
    testing.assert_close(testing.evaluate(case, path), expected, bound, f"{spec.to_dict()} {path}")
    testing.assert_close(testing.evaluate(case, path, splits=(3, 6, 7)), expected, bound, f"{spec.to_dict()} {path} split")


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("adam", "muon")])
def test_dual(memory, rule):
    """Every memory x linear rule x gate x order x read x mini-batch: the dual form is the definition, split anywhere."""
    for gate, order, read, mini_batch in (
        ("none", "first", "after", 4),
        ("scalar", "first", "before", 3),
        ("scalar", "coupled", "after", "sequence"),
    ):
        spec = declare(memory, rule, gate, order, read, mini_batch=mini_batch)
        assert ttr.select_path(spec)[0] == "dual"
        split_matches(spec, "dual")


@pytest.mark.parametrize("memory", ["linear", "mlp", "swiglu"])
@pytest.mark.parametrize("rule", ["sgd_dot", "delta", "momentum", "nesterov", "adam", "muon"])
def test_accumulate(memory, rule):
    """One step per mini-batch on the weighted sum, linear optimizers and others, with and without a gate and micro-steps."""
    for gate, steps in (("none", 1), ("scalar", 2)):
        split_matches(declare(memory, rule, gate, read="before", mini_batch=4, accumulate=True, steps=steps), "dual")


@pytest.mark.parametrize("memory", ["linear", "ttt_linear", "deep", "swiglu"])
@pytest.mark.parametrize("rule", ["delta", "nesterov", "averaged", "adam", "muon"])
def test_signals_per_tensor(memory, rule):
    """Every signal of the optimizer has a number for each weight tensor: one step per mini-batch, or token by token."""
    for gate, steps in (("weight_norm", 1), ("scalar", 2)):
        spec = declare(memory, rule, gate, read="before", mini_batch=4, accumulate=True, steps=steps)
        apart = {name: {"map": "sigmoid", "per": "tensor"} for name in spec.optimizer.signals()}
        split_matches(ttr.spec(spec, optimizer=apart), "dual")
        assert testing.random_inputs(ttr.spec(spec, optimizer=apart), T=2).tensors["step"].shape[-1] == len(spec.weight_names)


@pytest.mark.parametrize("mini_batch", [1, 4])
def test_per_tensor_is_per_head_where_all_tensors_have_the_same(mini_batch):
    """And other numbers give another memory. Such masks differ by tensor, so there is no dual form without accumulate."""
    spec = declare("swiglu", "nesterov", "scalar", mini_batch=mini_batch)
    apart = ttr.spec(spec, **{"optimizer.step": {"map": "sigmoid", "per": "tensor"}})
    why = ttr.select_path(apart)
    assert why[0] == "definition" and (mini_batch == 1 or "step per tensor gives every weight tensor a mask of its own" in why[1])
    case = testing.random_inputs(spec, T=6, dk=3, dv=3)
    step = case.tensors["step"]
    each = replace(case, spec=apart, tensors=case.tensors | {"step": step[..., None].expand(*step.shape, len(spec.weight_names))})
    expected = testing.evaluate(case, "definition", gradients=False)
    testing.assert_close(testing.evaluate(each, "definition", gradients=False), expected, 1e-12, "equal steps")
    scaled = replace(each, tensors=each.tensors | {"step": each.tensors["step"] * torch.linspace(0.5, 1, len(spec.weight_names))})
    assert max(testing.errors(testing.evaluate(scaled, "definition", gradients=False), expected).values()) > 1e-3


@pytest.mark.parametrize("memory", ["linear_learned", "mlp", "swiglu"])
@pytest.mark.parametrize("mini_batch", [1, 3])
def test_weight_norm_keeps_the_length_of_every_unit(memory, mini_batch):
    """After every token's step, or once per mini-batch; vectors (biases) are left alone."""
    schedule = {"mini_batch": mini_batch, "accumulate": True} if mini_batch > 1 else {}
    spec = declare(memory, "delta", "weight_norm", read="before", **schedule)
    assert ttr.select_path(spec)[0] == ("dual" if mini_batch > 1 else "definition")
    case = testing.random_inputs(spec, T=6, dk=3, dv=3, state=False)
    weights = testing.call(case)[1].weights
    for name, w in weights.items():
        before = case.params[name].expand_as(w)
        assert (w - before).abs().max() > 1e-3, name
        kept = torch.allclose(w.norm(dim=-2), before.norm(dim=-2), rtol=1e-6)
        assert kept == (w.ndim == 4), name


def test_weight_norm_leaves_units_of_zero_near_zero_and_has_gradients_there():
    spec = declare("linear", "delta", "weight_norm")
    got = testing.evaluate(testing.random_inputs(spec, T=5, dk=3, dv=3, state=False), "definition")
    assert got["weights.W"].abs().max() < 1e-4 and all(torch.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("position", ["mean", "learned"])
@pytest.mark.parametrize("memory", ["linear", "ttt_linear", "mlp"])
def test_position(memory, position):
    split_matches(declare(memory, "delta_mean", "none", mini_batch=4, position=position), "dual")


@pytest.mark.parametrize("memory", ["linear", "ttt_linear", "mlp"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mini_batch", [1, 4, "sequence"])
def test_definition_hands_its_state_on(memory, rule, mini_batch):
    """Every schedule, also where the definition is the only path: split = whole, with every gradient."""
    for gate in GATES:
        split_matches(declare(memory, rule, gate, mini_batch=mini_batch, step_rule="plain"), "definition", T=8)


@pytest.mark.parametrize("path", ["dual", "definition"])
def test_packed_mini_batches(path):
    """Mini-batches restart at every sequence, and sequences may stop inside one."""
    spec = declare("mlp", "momentum", "scalar", mini_batch=4)
    case = testing.random_inputs(spec, T=9, B=3, dk=3, dv=3)
    o, state = testing.call(testing.pack(case, [9, 2, 5]), path)
    start = 0
    for i, length in enumerate([9, 2, 5]):
        alone = testing.Inputs(spec, {n: t[i : i + 1, :length] for n, t in case.tensors.items()}, case.params)
        o_alone, state_alone = testing.call(alone, "definition")
        torch.testing.assert_close(o[:, start : start + length], o_alone, rtol=1e-9, atol=1e-11)
        for name, w in state_alone.weights.items():
            torch.testing.assert_close(state.weights[name][i : i + 1], w, rtol=1e-9, atol=1e-11)
        assert state.mini_batch["position"][i] == length % 4
        start += length


def test_dual_is_causal():
    spec = declare("mlp", "nesterov", "scalar", mini_batch=4)
    case = testing.random_inputs(spec, T=11, B=1, dk=3, dv=3)
    o, _ = testing.call(case, "dual")
    for t in case.tensors.values():
        t[:, 6:] = t[:, 6:] * 0.5
    o2, _ = testing.call(case, "dual")
    torch.testing.assert_close(o[:, :6], o2[:, :6], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(o[:, 6:], o2[:, 6:])


def test_meta_gradients_of_the_dual_form():
    """Second-order terms (the inner gradient depends on W_0) are right: gradcheck through a two-layer memory."""
    spec = declare("mlp", "momentum", "scalar", mini_batch=2)
    case = testing.random_inputs(spec, T=3, B=1, H=1, Hv=1, dk=2, dv=2, extreme=False)
    names = [*case.tensors, *case.params]
    leaves = [{**case.tensors, **case.params}[n].clone().requires_grad_() for n in names]

    def f(*leaves):
        given = dict(zip(names, leaves, strict=True))
        given["log_decay"] = given["log_decay"] - 0.1
        params = {n: given.pop(n) for n in case.params}
        q, k, v = (given.pop(n) for n in ("q", "k", "v"))
        return ttr.regress(q, k, v, spec, params=params, path="dual", **given)[0]

    assert torch.autograd.gradcheck(f, leaves)


def test_no_copy_of_the_weights_per_token():
    """The largest tensor of a mini-batch pass is far smaller than one weight matrix per token."""
    d, T = 32, 128
    spec = ttr.spec({"regressor": {"kind": "mlp"}, "optimizer": {"kind": "momentum", "mini_batch": 64}, "layer": BARE})
    case = testing.random_inputs(spec, T=T, B=1, Hv=1, dk=d, dv=d)
    with Largest() as largest:
        testing.call(case, "dual")
    assert largest.size < T * 4 * d * d / 16


@pytest.mark.parametrize(("memory", "decayed"), [("linear", {"W"}), ("deep", {"W1"}), ("mlp", {"W1"}), ("swiglu", {"W1", "W3"})])
def test_a_vector_gate_decays_what_the_key_enters(memory, decayed):
    """With nothing learned, a decayed key channel is a decayed row of the tensors that the key multiplies, and of no other."""
    spec = declare(memory, "delta", "vector")
    case = testing.random_inputs(spec, T=1, B=1, dk=3, dv=3)
    decay = torch.tensor([-1.0, 0.0, -0.5], dtype=torch.float64).expand(1, 1, 2, 3)
    case = testing.replace(case, tensors={**case.tensors, "step": torch.zeros(1, 1, 2, dtype=torch.float64), "log_decay": decay})
    _, state = testing.call(case, "definition")
    start = case.params if case.initial_state is None else {"W": case.initial_state[0]}
    for name, w in state.weights.items():
        expected = start[name] * decay[0, 0, 0].exp()[:, None] if name in decayed else start[name]
        torch.testing.assert_close(w[0], expected)
