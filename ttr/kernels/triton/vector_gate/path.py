"""From a checked call to the operators: one decay a key channel, and what each token writes with."""

from __future__ import annotations

import torch
from torch import Tensor

from ....objectives import slopes
from ...arguments import Call
from ..eligible import Plan
from ..signals import as_numbers, decay_of, weight_of
from .op import vector_gate


def run(call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """o and the last state. q, k, v: of one dtype, v with the normaliser's channels."""
    step, write_key, p = call.signals["step"], call.write_key, None
    if isinstance(step, Tensor) and step.ndim == 4:
        weight = _weight_by_channel(call, plan, step)
    else:
        weight = as_numbers(weight_of(call, plan), call.sizes[3])
    if write_key is not None:
        gain = slopes(call.spec.objective, call.sizes[5])[1]
        p = (write_key if gain == 1.0 else write_key * gain).to(q.dtype).contiguous()
    return vector_gate(
        q.contiguous(), k.contiguous(), v.contiguous(), p, log_decay_of(call), weight, start, cu_seqlens, call.scale,
        plan.erase, plan.look_before, plan.read_before,
    )  # fmt: skip


def _weight_by_channel(call: Call, plan: Plan, step: Tensor) -> Tensor:
    """[B, T, Hv, dk]: the steps that the step rule makes of the declared ones, times the objective's slope."""
    _, _, H, Hv, _, _ = call.sizes
    if plan.curvature is not None:
        keys = call.k.float()[:, :, :, None, :, None]
        with torch.autocast(keys.device.type, enabled=False):
            taken = call.spec.optimizer.step_rule.effective(step.float().unflatten(2, (H, Hv // H))[..., None], keys, plan.curvature)
        step = taken[..., 0].flatten(2, 3)
    return (step if plan.factor == 1.0 else step.float() * plan.factor).contiguous()


def log_decay_of(call: Call) -> Tensor:
    """[Hv, dk] or [B, T, Hv, dk] in the dtype it came in; a decay a head is that of all its channels."""
    (B, T, _, Hv, dk, _), decay = call.sizes, decay_of(call)
    if decay is None:
        return torch.zeros(Hv, dk, device=call.v.device)
    if decay.ndim in (0, 1):
        decay = decay.expand(Hv)[:, None].expand(Hv, dk)
    elif decay.ndim == 3:
        decay = decay[..., None].expand(B, T, Hv, dk)
    return decay.contiguous()
