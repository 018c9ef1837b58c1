"""ttr::two_layers_forward and ttr::two_layers_backward, importable without triton, and the autograd.Function around them.

As `mini_batch.op`, but for the memory: first and last are [B, Hv, r, slot], float32, a slot the numbers of Z, Y, c and d.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..autograd import apply, differentiated
from ..mini_batch.op import Gradients
from ..ops import _on_cpu, _on_its_device, _ready
from ..shapes import ceil_div
from .parts import group_of

TENSORS = 11  # the first arguments of an operator
library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rows, Tensor written, Tensor? kept, Tensor? factor, Tensor? gamma, "
    "Tensor? beta, Tensor first"
)
_FORM = "int size, int hidden, bool biased, str activation, bool residual, float eps, float curvature, float gain, bool before"
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
library.define(f"two_layers_forward({_INPUTS}, {_FORM}, bool save) -> (Tensor, Tensor, Tensor)", tags=_TAGS)  # o, last, checkpoints
library.define(
    # dq, dk, dv, dwritten, dfirst and of dmask, drows, dkept (if mixed), dfactor, dgamma, dbeta those that were given
    f"two_layers_backward(Tensor do, Tensor dlast, {_INPUTS}, Tensor checkpoints, {_FORM}, bool mixed) -> Tensor[]",
    tags=_TAGS,
)


@cache
def _form(*numbers):
    from .run import Form

    return Form(*numbers)


def _forward(*args):
    from . import run

    *form, save = args[TENSORS:]
    given: Any = *_ready(*args[:TENSORS]), _form(*form), save
    return run.forward(*given)


def _backward(do, dlast, *args):
    from . import run

    checkpoints, *form, mixed = args[TENSORS:]
    given: Any = *_ready(do, dlast, *args[:TENSORS]), checkpoints, _form(*form), mixed
    dq, dk, dv, dmask, drows, dwritten, *some, dfirst = run.backward(*given)
    return [dq, dk, dv, dwritten, dfirst, *(x for x in (dmask, drows, *some) if x is not None)]


def _like(*tensors: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def _fake_forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, size, hidden, *options):
    batches, device = v.shape[1] // size, v.device.index if v.is_cuda else -1
    several = ceil_div(batches, group_of(batches, hidden, device)) - 1 if options[-1] else 0
    return *_like(v, first), first.new_empty((several, *first.shape))


def _fake_backward(do, dlast, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, *rest):
    return _like(q, k, v, written, first, mask, rows, kept if rest[-1] else None, factor, gamma, beta)


for _name, _kernel, _fake in (("two_layers_forward", _forward, _fake_forward), ("two_layers_backward", _backward, _fake_backward)):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)


class TwoLayers(torch.autograd.Function):
    """(q, k, ..., first, *form) -> o, last, checkpoints."""

    @staticmethod
    def forward(*args):
        return torch.ops.ttr.two_layers_forward.default(*args, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[TENSORS:]
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:TENSORS], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlast, _checkpoints):
        *inputs, checkpoints = ctx.saved_tensors
        _, _, v, mask, rows, _, kept, factor, gamma, beta, first = inputs
        do = torch.zeros_like(v) if do is None else do
        dlast = torch.zeros_like(first) if dlast is None else dlast
        mixed = ctx.needs_input_grad[6]
        given = do, dlast, *inputs, checkpoints, *ctx.form, mixed
        got = iter(TwoLayersGradients.apply(*given) if torch.is_grad_enabled() else TwoLayersGradients.forward(*given))
        dq, dk, dv, dwritten, dfirst = (next(got) for _ in range(5))
        dmask, drows, dkept, dfactor, dgamma, dbeta = (
            None if x is None else next(got) for x in (mask, rows, kept if mixed else None, factor, gamma, beta)
        )
        return dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dfirst, *[None] * len(ctx.form)


class TwoLayersGradients(Gradients):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.two_layers_backward.default(*args))


def two_layers(*args) -> tuple[Tensor, Tensor]:
    """(q, k, ..., first, *form) -> o, the last memory."""
    if not differentiated(args[:TENSORS]):
        o, last, _ = torch.ops.ttr.two_layers_forward.default(*args, False)
        return o, last
    o, last, _ = apply(TwoLayers, *args)
    return o, last
