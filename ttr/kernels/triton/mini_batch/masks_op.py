"""ttr::mini_batch_masks_forward and ttr::mini_batch_masks_backward, importable without triton, and their autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import apply, differentiated
from ..ops import _on_cpu, _on_its_device, _ready
from .op import Gradients

library = torch.library.Library("ttr", "FRAGMENT")
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
library.define("mini_batch_masks_forward(Tensor numbers, int size, bool before) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)
library.define(
    "mini_batch_masks_backward(Tensor dmask, Tensor drows, Tensor dwritten, Tensor dmixing, Tensor numbers, int size, bool before) "
    "-> Tensor",
    tags=_TAGS,
)


def _forward(numbers, size, before):
    from . import masks

    given: Any = *_ready(numbers), size, before
    return masks.forward(*given)


def _backward(*args):
    from . import masks

    *tensors, size, before = args
    given: Any = *_ready(*tensors), size, before
    return masks.backward(*given)


def _fake_forward(numbers, size, before):
    _, N, T, HV = numbers.shape
    return tuple(numbers.new_empty(N, T // size, HV, *shape) for shape in ((size, size), (2, size), (2, size), (2, 2)))


def _fake_backward(dmask, drows, dwritten, dmixing, numbers, size, before):
    return torch.empty_like(numbers, memory_format=torch.contiguous_format)


for _name, _kernel, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    library.impl(f"mini_batch_masks_{_name}", _on_its_device(_kernel), "CUDA")
    library.impl(f"mini_batch_masks_{_name}", _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::mini_batch_masks_{_name}", _fake, lib=library)


class Masks(torch.autograd.Function):
    """(numbers, size, before) -> R, Q0, F, phi."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.mini_batch_masks_forward.default(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        numbers, *ctx.form = inputs
        ctx.save_for_backward(numbers)

    @staticmethod
    def backward(ctx, *given):
        backward = MasksGradients.apply if torch.is_grad_enabled() else MasksGradients.forward
        return backward(*given, *ctx.saved_tensors, *ctx.form), None, None


class MasksGradients(Gradients):
    """The gradient as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return torch.ops.ttr.mini_batch_masks_backward.default(*args)


def masks_of(numbers: Tensor, size: int, before: bool) -> tuple[Tensor, ...]:
    """R [N, mini-batches, Hv, b, b], Q0 and F [N, mini-batches, Hv, 2, b], phi [N, mini-batches, Hv, 2, 2] of numbers [10, N, T, Hv]."""
    if differentiated((numbers,)):
        return apply(Masks, numbers, size, before)
    return tuple(torch.ops.ttr.mini_batch_masks_forward.default(numbers, size, before))
