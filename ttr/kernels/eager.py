"""Whether a layer's own small step may be a kernel launch that nobody looks into."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton.eligible import DTYPES, capability_of, why_not_machine


def launches(x: Tensor) -> bool:
    """Eager calls on plain CUDA tensors: a compiler fuses the formula itself, and tracers and transforms go through it."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch.autograd.forward_ad._current_level < 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in DTYPES
        and x.numel() > 0
        and why_not_machine("cuda", capability_of(x.device)) is None
    )
