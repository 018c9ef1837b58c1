"""`rms_norm`: rows brought to a mean square of one and weighed. On a GPU one kernel each way: torch's own takes a block a row, five
times as long for rows as short as heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import launches
from .unit_norm import WIDEST


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last axis, computed in float32 at least, in x's dtype. x: [..., D]; weight: [D], of
    that dtype too."""
    if 0 < x.shape[-1] <= WIDEST and weight.device == x.device and type(weight) in (Tensor, torch.nn.Parameter) and launches(x):
        from .triton.rms_norm.function import RMSNorm

        return RMSNorm.apply(x, weight, float(eps))[0]
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)  # CUDA's autocast has it give float32
