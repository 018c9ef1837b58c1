"""`unit_norm`: keys and queries of length one. On a GPU one kernel each way in place of seven launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton.eligible import DTYPES, capability_of, why_not_machine

WIDEST = 4096  # channels that one program of the kernels holds


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis, computed in float32 at least, in x's dtype. x: [..., D]."""
    if x.is_cuda and _kernel_runs(x):
        from .triton.unit_norm.function import UnitNorm

        return UnitNorm.apply(x, float(eps))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _kernel_runs(x: Tensor) -> bool:
    """Eager calls on plain tensors: a compiler fuses the formula itself, and tracers and transforms go through it."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch.autograd.forward_ad._current_level < 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in DTYPES
        and 0 < x.shape[-1] <= WIDEST
        and x.numel() > 0
        and why_not_machine("cuda", capability_of(x.device)) is None
    )
