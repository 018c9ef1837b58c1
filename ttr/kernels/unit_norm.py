"""`unit_norm`: keys and queries of length one. On a GPU one kernel each way in place of seven launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import launches

WIDEST = 4096  # channels that one program of the kernels holds


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis, computed in float32 at least, in x's dtype. x: [..., D]."""
    if 0 < x.shape[-1] <= WIDEST and launches(x):
        from .triton.unit_norm.function import UnitNorm

        return UnitNorm.apply(x, float(eps))[0]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
