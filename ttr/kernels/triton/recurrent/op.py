"""ttr::recurrent_forward and ttr::recurrent_backward, importable without triton, and the autograd.Function around them.

The tensors are `run.Numbers` and the first slots [r, heads, dk, dv]; all float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import apply, differentiated
from ..ops import _on_cpu, _on_its_device, _ready

TENSORS = 12  # the first arguments of an operator
library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor? x, Tensor w, Tensor? v, Tensor A, Tensor b, Tensor? c, Tensor read, Tensor? known, Tensor? known_key, "
    "Tensor? known_value, Tensor first"
)
_FORM = "bool solve, bool before"
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
library.define(f"recurrent_forward({_INPUTS}, {_FORM}) -> (Tensor o, Tensor last)", tags=_TAGS)
# the gradients of all tensors that were given, in their order
library.define(f"recurrent_backward(Tensor do, Tensor? dlast, {_INPUTS}, {_FORM}) -> Tensor[]", tags=_TAGS)


def _forward(*args):
    from . import run

    *numbers, first = _ready(*args[:TENSORS])
    return run.forward(run.Numbers(*numbers), first, run.Form(*args[TENSORS:]))


def _backward(do, dlast, *args):
    from . import run

    *numbers, first = _ready(*args[:TENSORS])
    given: Any = *_ready(do, dlast), run.Numbers(*numbers), first, run.Form(*args[TENSORS:])
    return [x for x in run.backward(*given) if x is not None]


def _like(*tensors: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def _fake_forward(q, *args):
    first = args[TENSORS - 2]
    return q.new_empty(*q.shape[:2], first.shape[-1]), *_like(first)


def _fake_backward(do, dlast, *args):
    return _like(*args[:TENSORS])


for _name, _kernel, _fake in (("recurrent_forward", _forward, _fake_forward), ("recurrent_backward", _backward, _fake_backward)):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)


class Recurrent(torch.autograd.Function):
    """(q, x, ..., first, solve, before) -> o, last."""

    @staticmethod
    def forward(*args):
        return torch.ops.ttr.recurrent_forward.default(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS])

    @staticmethod
    def backward(ctx, do, dlast):
        inputs = ctx.saved_tensors
        q, first = inputs[0], inputs[-1]
        do = q.new_zeros(*q.shape[:2], first.shape[-1]) if do is None else do
        backward = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
        got = iter(backward(do, dlast, *inputs, *ctx.form))
        return *(None if x is None else next(got) for x in inputs), None, None


class Gradients(torch.autograd.Function):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.recurrent_backward.default(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("path='triton' has no second derivative; use path='chunk' (or recurrent) where a gradient is differentiated")


def scan(*args) -> tuple[Tensor, Tensor]:
    """(q, x, ..., first, solve, before) -> o and the last slots."""
    if not differentiated(args[:TENSORS]):
        return torch.ops.ttr.recurrent_forward.default(*args)
    return apply(Recurrent, *args)
