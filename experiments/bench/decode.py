"""One token of each contender that decodes, called as its user does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

import ttr
from experiments.bench.case import Case
from experiments.bench.linear import Inputs, Linear

Step = Callable[[Any], tuple[Tensor, Any]]  # state -> (o of one token, state after it)


def decode(case: Linear, who: str, x: Inputs, W: Tensor) -> tuple[Step, Any]:
    """One token: the step, and a state to start from that holds a copy of W: [B, Hv, dk, dv] float32."""
    if who == "ttr":
        assert case.declaration is not None
        spec, token = ttr.spec(case.declaration), x.token()

        def ours(state: ttr.State) -> tuple[Tensor, ttr.State]:
            o = ttr.decode(  # pyright: ignore[reportAttributeAccessIssue]
                token.q, token.k, token.v, spec, state, step=token.step, log_decay=token.log_decay
            )  # fmt: skip
            return o, state

        return ours, ttr.State(weights={"W": W.clone()}, spec_hash=spec.hash)
    ops = importlib.import_module("fla.ops")
    step, signals = {
        "simple_gla": (ops.fused_recurrent_simple_gla, {"g": x.log_decay}),
        "delta": (ops.fused_recurrent_delta_rule, {"beta": x.step}),
        "gated_delta": (ops.fused_recurrent_gated_delta_rule, {"g": x.log_decay, "beta": x.step}),
    }[case.name]

    def theirs(state: Tensor) -> tuple[Tensor, Tensor]:
        o, state = step(x.q, x.k, x.v, initial_state=state, output_final_state=True, **signals)
        return o[:, 0], state

    return theirs, W.clone()


def decoders(case: Case) -> tuple[str, ...]:
    """Who decodes this case, ours first; linear memories alone."""
    return tuple(who for who in case.who if isinstance(case, Linear) and who in ("ttr", "fla"))
