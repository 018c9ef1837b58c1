"""ttr::recurrent_forward and ttr::recurrent_backward, importable without triton, and the autograd.Function around them.

The tensors are `run.Numbers` and the first slots [r, heads, dk, dv]; all float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import CHUNK, apply, differentiated, empty_likes, gradients, operator, ready

TENSORS = 12  # the first arguments of an operator


def _forward(*args):
    from . import run

    *numbers, first = ready(*args[:TENSORS])
    return run.forward(run.Numbers(*numbers), first, run.Form(*args[TENSORS:]))


def _backward(do, dlast, *args):
    from . import run

    *numbers, first = ready(*args[:TENSORS])
    given: Any = *ready(do, dlast), run.Numbers(*numbers), first, run.Form(*args[TENSORS:])
    return [x for x in run.backward(*given) if x is not None]


def _fake_forward(q, *args):
    first = args[TENSORS - 2]
    return q.new_empty(*q.shape[:2], first.shape[-1]), *empty_likes(first)


def _fake_backward(do, dlast, *args):
    return empty_likes(*args[:TENSORS])


_INPUTS = (
    "Tensor q, Tensor? x, Tensor w, Tensor? v, Tensor A, Tensor b, Tensor? c, Tensor read, Tensor? known, Tensor? known_key, "
    "Tensor? known_value, Tensor first"
)
_FORM = "bool solve, bool before"
forward = operator(f"recurrent_forward({_INPUTS}, {_FORM}) -> (Tensor o, Tensor last)", _forward, _fake_forward)
backward = operator(  # the gradients of all tensors that were given, in their order
    f"recurrent_backward(Tensor do, Tensor? dlast, {_INPUTS}, {_FORM}) -> Tensor[]", _backward, _fake_backward
)
_gradients = gradients(backward, CHUNK)


class Recurrent(torch.autograd.Function):
    """(q, x, ..., first, solve, before) -> o, last."""

    @staticmethod
    def forward(*args):
        return forward(*args)

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
        return *_gradients(inputs, do, dlast, *inputs, *ctx.form), None, None


def scan(*args) -> tuple[Tensor, Tensor]:
    """(q, x, ..., first, solve, before) -> o and the last slots."""
    if not differentiated(args[:TENSORS]):
        return forward(*args)
    return apply(Recurrent, *args)
