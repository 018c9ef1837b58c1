"""ttr::recurrent_forward and ttr::recurrent_backward, importable without triton, and the autograd.Function around them.

The tensors are `run.Numbers`, the first slots [r, sequences x heads, dk, dv], all float32, and cu_seqlens: [N + 1] int32 or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import apply, differentiated, empty_likes, gradients, operator, ready

TENSORS = 12  # the first arguments of an operator, cu_seqlens the last of them
AGAIN = "use path='recurrent' where a gradient is differentiated"


def _numbers(*args) -> tuple[Any, Tensor, Tensor | None]:
    """`run.Numbers`, the first slots, cu_seqlens."""
    from . import run

    if wrong := [x.dtype for x in args[: TENSORS - 1] if x is not None and x.dtype != torch.float32]:
        raise ValueError(f"ttr::recurrent takes float32, got {wrong[0]}")
    *numbers, first, cu_seqlens = ready(*args)
    return run.Numbers(*numbers), first, cu_seqlens


def _forward(*args):
    from . import run

    return run.forward(*_numbers(*args[:TENSORS]), run.Form(*args[TENSORS:]))


def _backward(do, dlast, *args):
    from . import run

    *form, wanted = args[TENSORS:]
    do, dlast = ready(do, dlast)
    return [x for x in run.backward(do, dlast, *_numbers(*args[:TENSORS]), run.Form(*form), wanted) if x is not None]


def _fake_forward(q, *args):
    first = args[TENSORS - 3]
    return q.new_empty(*q.shape[:2], first.shape[-1]), *empty_likes(first)


def _fake_backward(do, dlast, *args):
    return empty_likes(*(x if want else None for x, want in zip(args, args[-1], strict=False)))


_INPUTS = (
    "Tensor q, Tensor k, Tensor? v, Tensor A, Tensor b, Tensor? c, Tensor read, Tensor? known, Tensor? known_key, Tensor? known_value, "
    "Tensor first, Tensor? cu_seqlens"
)
_FORM = "bool solve, bool before, int heads"
forward = operator(f"recurrent_forward({_INPUTS}, {_FORM}) -> (Tensor o, Tensor last)", _forward, _fake_forward)
backward = operator(  # the gradients of all tensors but cu_seqlens that were given and are wanted, in their order
    f"recurrent_backward(Tensor do, Tensor? dlast, {_INPUTS}, {_FORM}, bool[] wanted) -> Tensor[]", _backward, _fake_backward
)
_gradients = gradients(backward, AGAIN)


class Recurrent(torch.autograd.Function):
    """(q, k, ..., first, cu_seqlens, solve, before, heads) -> o, last."""

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
        if do is None and dlast is None:
            return (None,) * (TENSORS + 3)
        q, first = inputs[0], inputs[TENSORS - 2]
        do = q.new_zeros(*q.shape[:2], first.shape[-1]) if do is None else do
        wanted = list(ctx.needs_input_grad[: TENSORS - 1])
        asked = [x if want else None for x, want in zip(inputs, wanted, strict=False)]
        return *_gradients(asked, do, dlast, *inputs, *ctx.form, wanted), None, None, None, None


def scan(*args) -> tuple[Tensor, Tensor]:
    """(q, k, ..., first, cu_seqlens, solve, before, heads) -> o and the last slots."""
    if not differentiated(args[: TENSORS - 1]):
        return forward(*args)
    return apply(Recurrent, *args)
