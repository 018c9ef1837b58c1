"""ttr::two_layers_forward and ttr::two_layers_backward, importable without triton, and the autograd.Function around them.

As `mini_batch.op`, but for the memory: first and last are [B, Hv, r, slot], float32, a slot the numbers of Z, Y, c and d; first may be
[1, Hv, r, slot], with which all sequences begin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mini_batch.op import wants_written
from ..operators import DUAL, apply, differentiated, empty_likes, gradients, operator, ready
from ..shapes import ceil_div
from .parts import group_of, row_of

TENSORS = 11  # the first arguments of an operator


def _forward(*args):
    from . import groups, run

    *form, save = args[TENSORS:]
    given: Any = *ready(*args[:TENSORS]), groups.form_of(*form), save
    return run.forward(*given)


def _backward(do, dlast, *args):
    from . import groups, run

    checkpoints, *form, mixed = args[TENSORS:]
    given: Any = *ready(do, dlast, *args[:TENSORS], checkpoints), groups.form_of(*form), mixed
    dq, dk, dv, dmask, drows, dwritten, *some, dfirst = run.backward(*given)
    dwritten = dwritten if wants_written(args[6], mixed) else None
    return [dq, dk, dv, dfirst, *(x for x in (dmask, drows, dwritten, *some) if x is not None)]


def _fake_forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, size, hidden, *options):
    N, batches, device = v.shape[0], v.shape[1] // size, v.device.index if v.is_cuda else -1
    several = ceil_div(batches, group_of(batches, N * v.shape[2], hidden, device)) - 1 if options[-1] else 0
    return *empty_likes(v), first.new_empty((N, *first.shape[1:])), first.new_empty((several, row_of(N, first)))


def _fake_backward(do, dlast, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, *rest):
    mixed = rest[-1]
    dwritten, dkept = written if wants_written(kept, mixed) else None, kept if mixed else None
    return empty_likes(q, k, v, first, mask, rows, dwritten, dkept, factor, gamma, beta)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rows, Tensor written, Tensor? kept, Tensor? factor, Tensor? gamma, "
    "Tensor? beta, Tensor first"
)
_FORM = "int size, int hidden, bool biased, str activation, bool residual, float eps, float curvature, float gain, bool before"
forward = operator(  # o, last, checkpoints
    f"two_layers_forward({_INPUTS}, {_FORM}, bool save) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward
)
backward = operator(
    # dq, dk, dv, dfirst and of dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta those that were given and are wanted; mixed: as there
    f"two_layers_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor checkpoints, {_FORM}, bool mixed) -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip
_gradients = gradients(backward, DUAL)


class TwoLayers(torch.autograd.Function):
    """(q, k, ..., first, *form) -> o, last, checkpoints."""

    @staticmethod
    def forward(*args):
        return forward(*args, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[TENSORS:]
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:TENSORS], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlast, _checkpoints):
        *inputs, checkpoints = ctx.saved_tensors
        q, k, v, mask, rows, written, kept, factor, gamma, beta, first = inputs
        do = torch.zeros_like(v) if do is None else do
        mixed = ctx.needs_input_grad[5 if kept is None else 6]
        some = written if wants_written(kept, mixed) else None, kept if mixed else None
        wanted = q, k, v, first, mask, rows, *some, factor, gamma, beta
        dq, dk, dv, dfirst, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta = _gradients(
            wanted, do, dlast, *inputs, checkpoints, *ctx.form, mixed
        )
        return dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dfirst, *[None] * len(ctx.form)


def two_layers(*args) -> tuple[Tensor, Tensor]:
    """(q, k, ..., first, *form) -> o, the last memory."""
    if not differentiated(args[:TENSORS]):
        o, last, _ = forward(*args, False)
        return o, last
    o, last, _ = apply(TwoLayers, *args)
    return o, last
