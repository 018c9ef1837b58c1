"""path='triton' for least squares: a checked call to the operators and back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ....least_squares import Statistics, carries_inverse, least_scale, ridge_now, ridge_of
from ....spec import Spec
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
    """
    v, spec, (B, T, _, Hv, dk, dv) = call.v, call.spec, call.sizes
    cu_seqlens, device, n = call.cu_seqlens, v.device, B
    if cu_seqlens is not None:
        cu_seqlens, n = packed(cu_seqlens, B, T, device), len(cu_seqlens) - 1
    params = {name: p.float() for name, p in call.params.items()}
    inverse, pad = carries_inverse(spec), pad_of(spec, dv)
    ridge = beside = ridge_of(spec, params, torch.empty((), device=device))
    log_decay = log_decay_of(call) if spec.gate.per_key else as_numbers(decay_of(call), Hv)
    first_G = first_H = None
    if call.initial_state is not None or T == 0 or n == 0 or inverse or pad:
        state = initial(call.initial_state, spec, params, n, Hv, dk, dv, torch.float32, device)
        if T == 0 or n == 0:
            return v.new_zeros(B, T, Hv, dv), state
        start = Statistics.of(state)
        first_G, first_H = start.G.contiguous(), start.H
        if inverse:
            beside = ridge_now(spec, ridge, start.scale[0])
        if pad:  # s decays as a value channel of G does that nothing is written to, and s Lambda as H does: so they go along
            first_G = torch.cat([first_G, F.pad(start.scale[..., None], (0, pad - 1))], -1)
            first_H = first_H + torch.diag_embed(start.scale * ridge)
            beside = ridge * lacking(spec, start.scale, log_decay, cu_seqlens, call.q.shape[:2])
    if in_float32(spec):
        dtype = torch.float32
    q, k, wide = ((x if x.dtype == dtype else x.to(dtype)).contiguous() for x in (call.q, call.k, F.pad(v, (0, pad)) if pad else v))
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


def lacking(spec: Spec, start: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, tokens: tuple[int, ...]) -> Tensor:
    """What the ridge's scale s_t lacks of the least it may be, where it is read: [B, T, Hv, dk]. start: [N, Hv, dk]."""
    least, start, first = least_scale(torch.float32), start[:, None], None
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(tokens[1], device=start.device), right=True)
        start, first = start[sequence, 0][None], cu_seqlens[sequence].long()  # of every token's own sequence
    if log_decay is None:
        return (least - start).clamp(min=0).expand(*tokens, *start.shape[2:])
    d = 1 + (log_decay.ndim in (2, 4))
    x = log_decay.double().clamp(min=math.log(least) - 10)  # more is all of it, and infinities have no differences
    x = x.expand(*tokens, *x.shape[-d:]) if x.ndim == d else x
    x = x if d == 2 else x[..., None]
    summed = x.cumsum(1)
    before = summed - x
    read = before if spec.read.at == "before" else summed
    if first is not None:
        read = read - before[:, first]
    return (least - start * read.exp().float()).clamp(min=0)
