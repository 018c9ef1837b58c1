"""path='triton' for least squares: a checked call to the operators and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....least_squares import Statistics, carries_inverse, ridge_now, ridge_of
from ....state import State
from ...arguments import Call
from ...padded import initial
from ..eligible import in_float32, pad_of
from ..packed import packed
from ..signals import as_numbers, decay_of, per_head
from ..vector_gate.path import log_decay_of
from .op import least_squares


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token. dtype: the widest of q, k and v.

    In 16 bits conjugate gradients run on operands in fp16, whatever the inputs, with H scaled to it: H is within 2^-12 of itself,
    which the condition of H + Lambda magnifies in x. All else is in float32 (`in_float32`).

    A ridge that decays does so as the past in H does, so it is carried within H, and the least that is to stay of it beside H; its
    scale decays as a value channel of G does that nothing is written to, so it is one.
    """
    v, spec, (B, T, _, Hv, dk, dv) = call.v, call.spec, call.sizes
    cu_seqlens, device, n = call.cu_seqlens, v.device, B
    if cu_seqlens is not None:
        cu_seqlens, n = packed(cu_seqlens, B, T, device), len(cu_seqlens) - 1
    params = {name: p.float() for name, p in call.params.items()}
    inverse, pad = carries_inverse(spec), pad_of(spec, dv)
    ridge = beside = ridge_of(spec, params, torch.empty((), device=device))
    first_G = first_H = None
    if call.initial_state is not None or T == 0 or n == 0 or inverse or pad:
        state = initial(call.initial_state, spec, params, n, Hv, dk, dv, torch.float32, device)
        if T == 0 or n == 0:
            return v.new_zeros(B, T, Hv, dv), state
        start = Statistics.of(state)
        first_G, first_H = start.G.contiguous(), start.H
        if inverse or pad:
            first_H = first_H + torch.diag_embed(start.scale * ridge)
            beside = ridge_now(spec, ridge, torch.zeros_like(ridge)).detach()
        if pad:
            first_G = torch.cat([first_G, F.pad(start.scale[..., None], (0, pad - 1))], -1)
    if in_float32(spec):
        dtype = torch.float32
    q, k, wide = ((x if x.dtype == dtype else x.to(dtype)).contiguous() for x in (call.q, call.k, F.pad(v, (0, pad)) if pad else v))
    log_decay = log_decay_of(call) if spec.gate.per_key else as_numbers(decay_of(call), Hv)
    given = call.signals["weight"]
    weight = None if isinstance(given, float) and given == 1.0 else as_numbers(per_head(given, call), Hv)
    optimizer = spec.optimizer
    iterations, tolerance = (optimizer.iterations, float(optimizer.tolerance)) if optimizer.kind == "cg" else (None, 0.0)
    o, last_G, last_H = least_squares(
        q, k, wide, log_decay, weight, beside.contiguous(), first_G, first_H, cu_seqlens,
        call.scale, iterations, tolerance, spec.read.at == "before",
    )  # fmt: skip
    if pad:
        scale, o, last_G = last_G[..., dv], o[..., :dv], last_G[..., :dv]
        last_H = last_H - torch.diag_embed(scale * ridge)
    else:
        scale = torch.zeros_like(last_H[..., 0]) if inverse else torch.ones_like(last_H[..., 0])
    return o if o.dtype == v.dtype else o.to(v.dtype), Statistics(last_G, last_H, scale).state(spec, ridge)
