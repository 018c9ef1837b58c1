"""Each contender's call as its user writes it, with its own defaults; q is scaled by dk^-1/2 in all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ttr
from experiments.bench.cases import Case, Inputs

Call = Callable[[Inputs], Tensor]
Step = Callable[[Any], tuple[Tensor, Any]]  # state -> (o of one token, state after it)


def call(case: Case, who: str) -> Call:
    """The whole sequence: Inputs -> o: [B, T, Hv, dv]. Ours gives the final state out, peers are not asked for theirs."""
    if who == "ttr":
        assert case.declaration is not None
        spec = ttr.spec(case.declaration)
        return lambda x: ttr.regress(x.q, x.k, x.v, spec, step=x.step, log_decay=x.log_decay, path="triton")[0]
    if who == "torch":
        return _sdpa
    if who == "flash_qla":
        rule = importlib.import_module("flash_qla").chunk_gated_delta_rule
        return lambda x: rule(x.q, x.k, x.v, g=x.log_decay, beta=x.step)[0]
    ops = importlib.import_module("fla.ops")
    if case.name == "simple_gla":
        return lambda x: ops.chunk_simple_gla(x.q, x.k, x.v, g=x.log_decay)[0]
    if case.name == "delta":
        return lambda x: ops.chunk_delta_rule(x.q, x.k, x.v, beta=x.step)[0]
    return lambda x: ops.chunk_gated_delta_rule(x.q, x.k, x.v, g=x.log_decay, beta=x.step)[0]


def _sdpa(x: Inputs) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def decode(case: Case, who: str, x: Inputs, W: Tensor) -> tuple[Step, Any]:
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
    """Who decodes this case, ours first."""
    return tuple(who for who in case.who if who in ("ttr", "fla"))
