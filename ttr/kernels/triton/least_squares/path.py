"""path='triton' for least squares solved by conjugate gradients: a checked call to the operators and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ....least_squares import ridge_of, symmetric
from ....state import State
from ...arguments import Call
from ...padded import initial
from ..packed import packed
from ..signals import as_numbers, decay_of, per_head
from ..vector_gate.path import log_decay_of
from .op import least_squares


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token. dtype: the widest of q, k and v.

    In 16 bits the solve runs on operands in fp16, whatever the inputs, with H scaled to it: H is within 2^-12 of itself,
    which the condition of H + Lambda magnifies in x.
    """
    v, spec, facts, (B, T, _, Hv, dk, dv) = call.v, call.spec, call.facts, call.sizes
    cu_seqlens, device, n = call.cu_seqlens, v.device, B
    if cu_seqlens is not None:
        cu_seqlens, n = packed(cu_seqlens, B, T, device), len(cu_seqlens) - 1
    params = {name: p.float() for name, p in call.params.items()}
    first_G = first_H = None
    if call.initial_state is not None or T == 0 or n == 0:
        state = initial(call.initial_state, spec, params, n, Hv, dk, dv, torch.float32, device)
        if T == 0 or n == 0:
            return v.new_zeros(B, T, Hv, dv), state
        first_G, first_H = state.weights["G"].contiguous(), symmetric(state.weights["H"])
    q, k, wide = ((x if x.dtype == dtype else x.to(dtype)).contiguous() for x in (call.q, call.k, v))
    log_decay = log_decay_of(call) if spec.gate.per_key else as_numbers(decay_of(call), Hv)
    given = call.signals["weight"]
    weight = None if isinstance(given, float) and given == 1.0 else as_numbers(per_head(given, call), Hv)
    ridge = ridge_of(spec, params, torch.empty((), device=device)).contiguous()
    optimizer = spec.optimizer
    o, last_G, last_H = least_squares(
        q, k, wide, log_decay, weight, ridge, first_G, first_H, cu_seqlens,
        call.scale, optimizer.iterations, float(optimizer.tolerance), spec.read.at == "before",
    )  # fmt: skip
    return o if o.dtype == v.dtype else o.to(v.dtype), State(weights={"G": last_G, "H": last_H}, spec_hash=facts.hash)
