"""ttr::mini_batch_masks_forward and ttr::mini_batch_masks_backward, importable without triton, and their autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import DUAL, apply, differentiated, empty_likes, gradients, operator, ready


def _forward(numbers, size, before):
    from . import masks

    given: Any = *ready(numbers), size, before
    return masks.forward(*given)


def _backward(*args):
    from . import masks

    *tensors, size, before = args
    given: Any = *ready(*tensors), size, before
    return masks.backward(*given)


def _fake_forward(numbers, size, before):
    _, N, T, HV = numbers.shape
    return tuple(numbers.new_empty(N, T // size, HV, *shape) for shape in ((size, size), (2, size), (2, size), (2, 2)))


def _fake_backward(dmask, drows, dwritten, dmixing, numbers, size, before):
    return empty_likes(numbers)[0]


forward = operator(
    "mini_batch_masks_forward(Tensor numbers, int size, bool before) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _fake_forward
)
backward = operator(
    "mini_batch_masks_backward(Tensor dmask, Tensor drows, Tensor dwritten, Tensor dmixing, Tensor numbers, int size, bool before) "
    "-> Tensor",
    _backward, _fake_backward,
)  # fmt: skip
_gradients = gradients(lambda *args: [backward(*args)], DUAL)


class Masks(torch.autograd.Function):
    """(numbers, size, before) -> R, Q0, F, phi."""

    @staticmethod
    def forward(*args):
        return tuple(forward(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        numbers, *ctx.form = inputs
        ctx.save_for_backward(numbers)

    @staticmethod
    def backward(ctx, *given):
        return *_gradients(ctx.saved_tensors, *given, *ctx.saved_tensors, *ctx.form), None, None


def masks_of(numbers: Tensor, size: int, before: bool) -> tuple[Tensor, ...]:
    """R [N, mini-batches, Hv, b, b], Q0 and F [N, mini-batches, Hv, 2, b], phi [N, mini-batches, Hv, 2, 2] of numbers [10, N, T, Hv]."""
    if differentiated((numbers,)):
        return apply(Masks, numbers, size, before)
    return tuple(forward(numbers, size, before))
