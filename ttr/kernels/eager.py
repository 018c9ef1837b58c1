"""Whether somebody looks into a call: whether a layer's own small step may be a launch, and numbers may be looked at."""

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


def must_be_seen(x: Tensor) -> bool:
    """Whether somebody follows what happens to x who cannot follow a launch: a vmap (torch.func's, is_grads_batched's), a tracer."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x) or torch._C._len_torch_dispatch_stack() > 0


def known(x: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting: eager and on the CPU, with no tracer that has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not must_be_seen(x)
