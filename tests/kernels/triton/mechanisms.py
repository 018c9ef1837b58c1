"""The declarations the kernels serve, and the calls the tests make of them."""

import torch

import ttr
from ttr import testing

DELTA = {"kind": "delta", "step": "sigmoid"}
SGD = {"kind": "sgd", "step": "sigmoid"}


def _declare(objective: str, optimizer: object, gate: object = "none", read: str = "after"):
    return ttr.spec({"regressor": "linear", "objective": objective, "optimizer": optimizer, "gate": gate, "read": read})


COUPLED = {"kind": "scalar", "order": "coupled"}
MECHANISMS = {
    "linear attention": _declare("dot", {"kind": "sgd", "step": 1.0}),
    "retnet": _declare("dot", {"kind": "sgd", "step": 1.0}, "fixed"),
    "gated": _declare("dot", {"kind": "sgd", "step": 1.0}, "scalar"),
    "mamba": _declare("dot", SGD, "scalar"),
    "mamba, read before": _declare("dot", SGD, "scalar", "before"),
    "half steps": _declare("dot", {"kind": "sgd", "step": 0.5}, "fixed", "before"),
    "unit steps": _declare("l2", {"kind": "delta", "step": 1.0}),
    "delta": _declare("l2", DELTA),
    "delta, fixed gate": _declare("l2", DELTA, "fixed"),
    "delta, read before": _declare("l2", DELTA, "none", "before"),
    "gated delta": _declare("l2", DELTA, "scalar"),
    "gated delta, unit steps": _declare("l2", {"kind": "delta", "step": 1.0}, "scalar"),
    "gated delta, read before": _declare("l2", DELTA, "scalar", "before"),
    "coupled": _declare("l2", DELTA, COUPLED),
    "coupled, read before": _declare("l2", DELTA, COUPLED, "before"),
    "nlms": _declare("l2", {**DELTA, "step_rule": "nlms"}, "scalar"),
    "implicit": _declare("l2", {**DELTA, "step_rule": "implicit"}, "scalar"),
    "mamba, 3 steps": _declare("dot", {**SGD, "steps": 3}, "scalar"),
    "deltaproduct": _declare("l2", {**DELTA, "steps": 3}),
    "gated deltaproduct": _declare("l2", {**DELTA, "steps": 2}, "scalar"),
    "coupled deltaproduct, read before": _declare("l2", {**DELTA, "steps": 4}, COUPLED, "before"),
    "nlms, 2 steps": _declare("l2", {**DELTA, "steps": 2, "step_rule": "nlms"}, "fixed"),
}


def mini_batches(kind: str = "delta", *, regressor: object, gate: object = "none", read: str = "after", **fields):
    """A declaration of mini-batches of 16 tokens, or as `fields` of the optimizer say."""
    optimizer = {"kind": kind, "mini_batch": 16, **fields}
    objective = {"kind": "l2", "reduce": "mean"}
    return ttr.spec({"regressor": regressor, "objective": objective, "optimizer": optimizer, "gate": gate, "read": read})


def inputs(name: str, lengths: int | list[int], **options) -> testing.Inputs:
    """Random arguments in float64: one length for every row, or the lengths of packed sequences."""
    spec = MECHANISMS[name]
    if isinstance(lengths, int):
        return testing.random_inputs(spec, T=lengths, **options)
    return testing.pack(testing.random_inputs(spec, T=max(lengths), B=len(lengths), **options), lengths)


def definition(case: testing.Inputs) -> dict[str, torch.Tensor]:
    """What the call means, in float64: the chunk path, which test_conformance.py holds against the definition."""
    return testing.evaluate(case.to(torch.float64), {"kind": "chunk", "chunk_size": 16})
