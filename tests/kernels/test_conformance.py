"""The conformance table: rows are declarations, columns are paths; every cell is held against the definition in float64.

Outputs, final state and the gradient of every input. The cross product of the linear family is complete at small
sizes; lengths, chunk sizes, splits, packing and low precision are sampled from it.
"""

import itertools
import random

import pytest
import torch

import ttr
from kernels.largest import Largest
from ttr import testing

GATES = {
    "none": {"kind": "none"},
    "fixed": {"kind": "fixed", "decay": [-0.05, -1.5]},
    "scalar": {"kind": "scalar"},
    "vector": {"kind": "vector"},
}
RULES = {
    "sgd": {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": "dot"},
    "delta": {"optimizer": {"kind": "delta"}, "objective": "l2"},
    "delta_mean": {"optimizer": {"kind": "delta"}, "objective": {"kind": "l2", "reduce": "mean"}},
    "momentum_dot": {"optimizer": {"kind": "momentum"}, "objective": "dot"},
    "momentum": {"optimizer": {"kind": "momentum"}, "objective": "l2"},
    "nesterov_dot": {"optimizer": {"kind": "momentum", "nesterov": True}, "objective": "dot"},
    "nesterov": {"optimizer": {"kind": "momentum", "nesterov": True}, "objective": "l2"},
    "averaged_dot": {"optimizer": {"kind": "averaged"}, "objective": "dot"},
    "averaged": {"optimizer": {"kind": "averaged"}, "objective": "l2"},
}
BARE = {"q": [], "k": [], "v": [], "output": []}


def declare(gate, order, rule, step_rule, steps, read, **more):
    body = {**RULES[rule], "gate": {**GATES[gate], "order": order}, "read": read, "layer": BARE}
    body["optimizer"] = {**body["optimizer"], "step_rule": step_rule, "steps": steps, **more}
    return ttr.spec(body)


CROSS_PRODUCT = list(itertools.product(GATES, ("first", "coupled"), RULES, ("plain", "nlms", "implicit"), (1, 3), ("after", "before")))
SEPARATE = [
    (gate, order, rule, "plain", steps, "after")
    for gate, order, rule, steps in itertools.product(GATES, ("first", "coupled"), ("delta", "momentum", "nesterov", "averaged"), (1, 3))
]


@pytest.mark.parametrize(("gate", "order", "rule"), list(itertools.product(GATES, ("first", "coupled"), RULES)))
def test_cross_product_complete(gate, order, rule):
    """Every gate x order x rule x step rule x micro-steps x read, small: recurrent and chunk equal the definition."""
    for row in (r for r in CROSS_PRODUCT if r[:3] == (gate, order, rule)):
        testing.assert_conforms(declare(*row), T=5, B=1, dk=3, dv=2, chunk_sizes=(2, 8), seed=CROSS_PRODUCT.index(row))


@pytest.mark.parametrize("row", SEPARATE, ids=lambda r: "-".join(map(str, r[:5])))
def test_separate_write_keys(row):
    """General diagonal plus low rank: its own write key, steps per key channel and per head."""
    for per in ("head", "key"):
        spec = declare(*row, write_key="separate", step={"per": per})
        testing.assert_conforms(spec, T=5, B=1, dk=3, dv=2, chunk_sizes=(2, 8))


@pytest.mark.parametrize("rule", ["delta", "momentum", "sgd"])
@pytest.mark.parametrize("gate", GATES)
def test_per_channel_steps(rule, gate):
    """A step per key channel takes every path; a step per value channel takes chunk only where nothing is solved."""
    testing.assert_conforms(declare(gate, "first", rule, "plain", 1, "after", step={"per": "key"}))
    per_value = declare(gate, "first", rule, "implicit" if rule != "sgd" else "plain", 1, "after", step={"per": "value"})
    testing.assert_conforms(per_value)
    assert ("chunk" in testing.targets(per_value)) == (rule == "sgd")


@pytest.mark.parametrize("normalizer", ["sum", "max1"])
@pytest.mark.parametrize("rule", ["sgd", "delta", "momentum"])
def test_readout_normalizer(normalizer, rule):
    testing.assert_conforms(
        ttr.spec({**RULES[rule], "gate": "scalar", "read": {"normalizer": normalizer}, "layer": BARE}),
        extreme=False,
        correlation=0.9,
    )


def sample(count, seed, pool=CROSS_PRODUCT):
    return random.Random(seed).sample(pool, count)


@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127])
def test_lengths_and_chunk_sizes(T):
    for row in [
        *sample(2, T),
        ("scalar", "first", "delta", "plain", 1, "after"),
        ("vector", "coupled", "nesterov", "plain", 1, "after"),
    ]:
        testing.assert_conforms(declare(*row), T=T, B=1, chunk_sizes=(1, 16, 64, 128), seed=T)


@pytest.mark.parametrize("seed", range(8))
def test_splits(seed):
    """Handing the state on at arbitrary tokens changes nothing, gradients included, whatever path runs each part."""
    (row,) = sample(1, 100 + seed)
    case = testing.random_inputs(declare(*row), T=23, seed=seed)
    whole = testing.evaluate(case, "definition")
    for path in ("chunk", "recurrent", "definition"):
        cuts = sorted(random.Random(seed).sample(range(1, 23), 3))
        testing.assert_close(testing.evaluate(case, path, splits=cuts), whole, 1e-9, f"{row} {path} split at {cuts}")


@pytest.mark.parametrize("seed", range(8))
def test_packed(seed):
    """Sequences packed by cu_seqlens equal the same sequences alone: values, states, gradients; an empty one too."""
    (row,) = sample(1, 200 + seed)
    lengths = [5, 1, 0, 17]
    case = testing.random_inputs(declare(*row), T=17, B=4, seed=seed)
    packed = testing.pack(case, lengths)
    expected = testing.evaluate(packed, "definition")
    for path in ("chunk", "recurrent"):
        testing.assert_close(testing.evaluate(packed, path), expected, 1e-9, f"{row} {path} packed")
    for i, length in enumerate(lengths):
        if length:
            alone = testing.call(
                testing.Inputs(
                    case.spec,
                    {n: t[i : i + 1, :length] for n, t in case.tensors.items()},
                    case.params,
                    case.initial_state[i : i + 1],
                )
            )
            start = sum(lengths[:i])
            torch.testing.assert_close(expected["o"][:, start : start + length], alone[0], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(expected["weights.W"][i : i + 1], alone[1].weights["W"], rtol=1e-9, atol=1e-10)
        else:
            torch.testing.assert_close(expected["weights.W"][i], case.initial_state[i])


LOW_PRECISION = [
    ("none", "first", "delta", "plain", 1, "after"),
    ("scalar", "first", "sgd", "plain", 1, "after"),
    ("scalar", "first", "delta", "plain", 1, "after"),
    ("vector", "first", "delta", "plain", 1, "after"),
    ("vector", "coupled", "nesterov", "implicit", 1, "before"),
    ("scalar", "coupled", "momentum", "nlms", 3, "after"),
    ("vector", "first", "averaged", "plain", 1, "after"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", LOW_PRECISION, ids=lambda r: "-".join(map(str, r)))
def test_low_precision(row, dtype):
    """Errors in float32 and bf16 stay within 4x (float32) or 1.5x (bf16) the definition's own error in that dtype.

    Both are measured against float64 on the same rounded inputs, as the largest over three draws, so that one lucky
    rounding of the reference is not the yardstick; one unit in the last place is always allowed. float32 gets the
    wider factor because a sum of C terms by matmul rounds in another order than the loop.
    """
    spec = declare(*row)
    own: dict[str, float] = {}
    paths: dict[str, dict[str, float]] = {"chunk": {}, "recurrent": {}}
    for seed in range(3):
        case = testing.random_inputs(spec, T=65, B=1, dk=8, dv=8, seed=seed).to(dtype)
        exact = testing.evaluate(case.to(torch.float64), "definition")
        for name, error in testing.errors(testing.evaluate(case, "definition"), exact).items():
            own[name] = max(own.get(name, 0.0), error)
        for path, worst in paths.items():
            for name, error in testing.errors(testing.evaluate(case, path), exact).items():
                worst[name] = max(worst.get(name, 0.0), error)
    factor = 4.0 if dtype == torch.float32 else 1.5
    for path, worst in paths.items():
        for name, error in worst.items():
            allowed = factor * own[name] + torch.finfo(dtype).eps
            assert error <= allowed, (
                f"{row} {path} {dtype}: {name} is off by {error:.2e}, allowed {allowed:.2e} (definition {own[name]:.2e})"
            )


@pytest.mark.parametrize("path", ["chunk", "recurrent", "definition"])
def test_causality(path):
    """A changed token changes nothing before it."""
    for row in sample(4, 300):
        case = testing.random_inputs(declare(*row), T=19, B=1)
        o, _ = testing.call(case, path)
        changed = testing.replace(case, tensors={n: t.clone() for n, t in case.tensors.items()})
        for t in changed.tensors.values():
            t[:, 11:] = t[:, 11:] * 0.5
        o2, _ = testing.call(changed, path)
        torch.testing.assert_close(o[:, :11], o2[:, :11], rtol=0, atol=0) if path != "chunk" else torch.testing.assert_close(
            o[:, :11], o2[:, :11], rtol=1e-12, atol=1e-12
        )
        assert not torch.allclose(o[:, 11:], o2[:, 11:])


def test_second_derivatives_of_chunk():
    """The torch paths are differentiable again (the kernels refuse): gradgradcheck of the gated delta rule."""
    spec = declare("scalar", "first", "delta", "plain", 1, "after")
    case = testing.random_inputs(spec, T=3, B=1, H=1, Hv=1, dk=2, dv=2, extreme=False)
    leaves = [case.tensors[n].requires_grad_() for n in ("q", "k", "v", "step", "log_decay")]

    def f(q, k, v, step, log_decay):
        return ttr.regress(q, k, v, spec, step=step, log_decay=log_decay - 0.1, path={"kind": "chunk", "chunk_size": 2})[0]

    assert torch.autograd.gradgradcheck(f, leaves)


def test_chunk_memory_is_linear():
    """No tensor of T dk dv numbers, and the largest one grows linearly in T."""
    for gate in ("none", "scalar", "vector"):
        sizes = {}
        for T in (512, 1024):
            dk = dv = 64
            case = testing.random_inputs(
                declare(gate, "first", "delta", "plain", 1, "after"), T=T, B=1, Hv=1, dk=dk, dv=dv, dtype=torch.float32
            )
            with Largest() as largest:
                testing.call(case, "chunk")
            assert largest.size < T * dk * dv / 8, f"{gate}: a tensor of {largest.size} numbers at T = {T}"
            sizes[T] = largest.size
        assert sizes[1024] <= 2.1 * sizes[512], f"{gate}: {sizes}"
