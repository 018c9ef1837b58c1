"""One token of each contender that decodes, called as its user does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

import ttr
from experiments.bench.case import Case
from experiments.bench.linear import Inputs, Linear

FLA = {  # its op, and its names for our signals
    "simple_gla": ("fused_recurrent_simple_gla", {"g": "log_decay"}),
    "delta": ("fused_recurrent_delta_rule", {"beta": "step"}),
    "gated_delta": ("fused_recurrent_gated_delta_rule", {"g": "log_decay", "beta": "step"}),
}
Step = Callable[[Any], tuple[Tensor, Any]]  # state -> (o of one token, state after it)


def decode(case: Linear, who: str, x: Inputs, W: Tensor) -> tuple[Step, Any]:
    """One token: the step, and a state to start from that holds a copy of W: [B, Hv, dk, dv] float32."""
    if who == "ttr":
        assert case.declaration is not None
        spec, token = ttr.spec(case.declaration), x.token()
        given: dict[str, Any] = dict(token.signals)

        def ours(state: ttr.State) -> tuple[Tensor, ttr.State]:
            o = ttr.decode(  # pyright: ignore[reportAttributeAccessIssue]
                token.q, token.k, token.v, spec, state, **given
            )  # fmt: skip
            return o, state

        return ours, ttr.State(weights={"W": W.clone()}, spec_hash=spec.hash)
    name, renamed = FLA[case.name]
    step = getattr(importlib.import_module("fla.ops"), name)
    signals = {theirs: x.signals[ours] for theirs, ours in renamed.items()}

    def theirs(state: Tensor) -> tuple[Tensor, Tensor]:
        o, state = step(x.q, x.k, x.v, initial_state=state, output_final_state=True, **signals)
        return o[:, 0], state

    return theirs, W.clone()


def decoders(case: Case) -> tuple[str, ...]:
    """Who decodes this case, ours first; linear memories alone, those that fla is known to decode."""
    return ("ttr", "fla") if case.name in FLA else ()
