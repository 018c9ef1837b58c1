"""The peers' ops for linear memories: where they are, and what a case's inputs are called there.

Signs and scales are ours: log decays are natural logs; queries are scaled by dk^-1/2 where the declaration says so, by
default there too. What a peer takes in another form is made beforehand, outside its time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import softplus

from experiments.bench.case import Contender

if TYPE_CHECKING:
    from experiments.bench.linear import Inputs


@dataclass(frozen=True, kw_only=True)
class Op:
    """`tensors` of our inputs, by the names of the op's arguments; gradients are taken of all of them."""

    module: str
    name: str
    tensors: Callable[[Inputs], Mapping[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)


def contender(who: str, case: str, x: Inputs) -> Contender:
    op = OPS[who, case]
    function, tensors = getattr(importlib.import_module(op.module), op.name), op.tensors(x)
    return Contender(call=lambda: function(**tensors, **op.options)[0], leaves=list(tensors.values()))


def _plain(*renamed: str) -> Callable[[Inputs], Mapping[str, Tensor]]:
    """q, k, v and signals: g is the log decay, beta the step."""
    ours = {"g": "log_decay", "beta": "step"}
    return lambda x: {"q": x.q, "k": x.k, "v": x.v, **{name: x.signals[ours[name]] for name in renamed}}


def _rwkv7(x: Inputs) -> Mapping[str, Tensor]:
    """S <- diag(e^w) S + b (a^T S) + k v^T: looked up with a, erased along b, written along k."""
    assert x.write_key is not None
    erased = (x.k * x.signals["step"]).to(x.k.dtype)
    return {"r": x.q, "w": x.signals["log_decay"], "k": x.write_key, "v": x.v, "a": -x.k, "b": erased}


def _micro_steps(x: Inputs) -> Mapping[str, Tensor]:
    """A token's pairs stand one behind the other on the time axis."""
    k, v, step = (y.flatten(1, 2) for y in (x.k, x.v, x.signals["step"]))
    return {"q": x.q, "k": k, "v": v, "g": x.signals["log_decay"], "beta": step}


def _momentum(x: Inputs) -> Mapping[str, Tensor]:
    """M <- mu M - eta k (v - alpha S^T k)^T, S <- alpha S - beta M, beta = 1 by default."""
    s = x.signals
    return {"q": x.q, "k": x.k, "v": x.v, "log_alpha": s["log_decay"], "log_mu": s["momentum"].log(), "eta": s["step"]}


def _mesa(x: Inputs) -> Mapping[str, Tensor]:
    ridge = softplus(x.params["ridge"]) + RIDGE_FLOOR
    return {"q": x.q, "k": x.k, "v": x.v, "g": x.signals["log_decay"], "beta": x.signals["weight"], "lamb": ridge}


RIDGE_FLOOR = 0.25  # the preset mesanet's
LOWER_BOUND = -0.6065306597126334  # the preset rwkv7's least log decay; those of the benchmark lie above
OPS = {
    ("fla", "simple_gla"): Op(module="fla.ops", name="chunk_simple_gla", tensors=_plain("g")),
    ("fla", "gated_delta"): Op(module="fla.ops", name="chunk_gated_delta_rule", tensors=_plain("g", "beta")),
    ("flash_qla", "gated_delta"): Op(module="flash_qla", name="chunk_gated_delta_rule", tensors=_plain("g", "beta")),
    ("fla", "delta"): Op(module="fla.ops", name="chunk_delta_rule", tensors=_plain("beta")),
    ("fla", "gla"): Op(module="fla.ops.gla", name="chunk_gla", tensors=_plain("g")),
    ("fla", "kda"): Op(module="fla.ops.kda", name="chunk_kda", tensors=_plain("g", "beta")),
    ("fla-bounded", "kda"): Op(module="fla.ops.kda", name="chunk_kda", tensors=_plain("g", "beta"), options={"safe_gate": True}),
    ("fla", "rwkv7"): Op(module="fla.ops.rwkv7", name="chunk_rwkv7", tensors=_rwkv7),
    ("fla-bounded", "rwkv7"): Op(module="fla.ops.rwkv7", name="chunk_rwkv7", tensors=_rwkv7, options={"lower_bound": LOWER_BOUND}),
    ("fla", "deltaproduct2"): Op(
        module="fla.ops.gated_delta_product", name="chunk_gated_delta_product", tensors=_micro_steps, options={"num_householder": 2}
    ),
    ("fla", "momentum_delta"): Op(
        module="fla.ops.momentum_delta_rule",
        name="chunk_momentum_delta_rule",
        tensors=_momentum,
        options={"use_qk_l2norm_in_kernel": False},
    ),
    ("fla", "mesa"): Op(module="fla.ops.mesa_net", name="chunk_mesa_net", tensors=_mesa, options={"max_CG_iteration": 30}),
}
