"""Signals, numbers or tensors of any shape, as the kernels take them: one number a head, [Hv] or [B, T, Hv], in float32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..arguments import Call, gate_decay
from .eligible import Plan


def signals_of(call: Call) -> dict[str, Tensor]:
    """All of a call's, at least [Hv], in float32."""
    return {name: per_head(x, call).float() for name, x in call.signals.items()}


def decay_of(call: Call) -> Tensor | None:
    """The log decay as the caller or the gate gives it, of any shape and dtype."""
    names = call.facts.gate_signals
    signals = {name: per_head(x, call) for name, x in call.signals.items() if name in names or name == "log_decay"}
    return gate_decay(signals, call, torch.float32)


def weight_of(call: Call, plan: Plan) -> Tensor | None:
    """What multiplies the write: the step, as its rule takes it, times the objective's slope; None: 1."""
    if plan.curvature is not None:
        taken = taken_step(call, plan.curvature)
        return taken if plan.factor == 1.0 else taken * plan.factor
    step = call.signals["step"]
    if isinstance(step, Tensor):
        return step if plan.factor == 1.0 else step.float() * plan.factor
    return None if step * plan.factor == 1.0 else number_of(step * plan.factor, call.sizes[3], call.v.device)


def taken_step(call: Call, curvature: float) -> Tensor:
    """The step that the step rule makes of the declared one: a number for every pair and head."""
    k, (_, _, H, Hv, _, _) = call.k, call.sizes
    # heads as [H, Hv / H]: the value heads of a group share their key
    step = per_head(call.signals["step"], call).float().unflatten(-1, (H, Hv // H))[..., None, None]
    with torch.autocast(k.device.type, enabled=False):
        taken = call.spec.optimizer.step_rule.effective(step, k.float()[..., None, :, None], curvature)
    return taken.expand(*k.shape[:-1], Hv // H, 1, 1).reshape(*k.shape[:-2], Hv)


def as_numbers(x: Tensor | None, Hv: int) -> Tensor | None:
    """Float32, [Hv] or [B, T, Hv], contiguous."""
    if x is None:
        return None
    x = x if x.ndim else x.expand(Hv)
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def per_head(x: Tensor | float, call: Call) -> Tensor:
    """A signal of a call, at least [Hv]."""
    Hv = call.sizes[3]
    return (x if x.ndim else x.expand(Hv)) if isinstance(x, Tensor) else number_of(x, Hv, call.v.device)


def number_of(value: float, Hv: int, device: torch.device) -> Tensor:
    """[Hv] of one number."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.full((Hv,), value, dtype=torch.float32, device=device)  # what a graph fills is empty until it is replayed
    return _kept_number(value, Hv, device)


@lru_cache(maxsize=1024)
def _kept_number(value: float, Hv: int, device: torch.device) -> Tensor:
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.full((Hv,), value, dtype=torch.float32, device=device)
