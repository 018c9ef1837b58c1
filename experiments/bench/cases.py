"""The mechanisms that are measured."""

from __future__ import annotations

from experiments.bench.linear import Linear

CASES = {
    case.name: case
    for case in (
        Linear(
            name="simple_gla",
            title="scalar decay (simple GLA)",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "objective": "dot", "optimizer": {"kind": "sgd", "step": 1.0}, "gate": "scalar"},
            log_decay=True,
        ),
        Linear(
            name="gated_delta",
            title="gated delta rule",
            who=("ttr", "fla", "flash_qla"),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": {"kind": "scalar", "order": "first"}},
            step=True,
            log_decay=True,
            unit_keys=True,
        ),
        Linear(
            name="delta",
            title="delta rule",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": "none"},
            step=True,
            unit_keys=True,
        ),
        Linear(name="sdpa", title="causal softmax attention", who=("torch",)),
    )
}
