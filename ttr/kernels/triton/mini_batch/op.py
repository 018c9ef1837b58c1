"""ttr::mini_batch_forward and ttr::mini_batch_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype, T a multiple of the mini-batch b. In float32, for the T / b mini-batches of
a row: mask R [B, T / b, Hv, b, b], rows Q0 and written F [B, T / b, Hv, r, b], kept phi [B, T / b, Hv, r, r]; or none of these
but written, [10, B, T, Hv], the numbers that `masks` makes them of, forward and once more backward; or written [B, T, Hv] and
factor [Hv, b] or None, where there are no masks (`places`). gamma, beta [Hv, dv] or None; first, last [B, Hv, r, dk, dv], their
biases [B, Hv, r, dv] or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import DUAL, apply, differentiated, empty_likes, gradients, operator, ready

TENSORS = 12  # the first arguments of an operator


def _forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, *form):
    from . import run

    given: Any = *ready(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias), run.form_of(*form)
    o, last, last_bias, starts, start_biases, gradient = run.forward(*given)
    return [x for x in (o, last, starts, gradient, last_bias, start_biases) if x is not None]


def _backward(
    do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, starts, gradient,
    start_biases, *options,
):  # fmt: skip
    from . import run

    *form, mixed = options
    given: Any = ready(
        do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, starts, start_biases, gradient
    )
    rest: Any = run.form_of(*form), mixed
    dq, dk, dv, dmask, drows, dwritten, *some, dfirst, dfirst_bias = run.backward(*given, *rest)
    dwritten = dwritten if wants_written(kept, mixed) else None
    return [dq, dk, dv, dfirst, *(x for x in (dmask, drows, dwritten, *some, dfirst_bias) if x is not None)]


def wants_written(kept: Tensor | None, mixed: bool) -> bool:
    """Whether backward gives a gradient of `written`; of F, which comes with phi, it always does."""
    return kept is not None or mixed


def _fake_forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, size, *form):
    B, T, _, dv = v.shape
    saved = B, T // size, *first.shape[1:3]
    biases = [] if first_bias is None else [first_bias, first_bias.new_empty(*saved, dv)]
    return [*empty_likes(v, first), q.new_empty(*saved, *first.shape[3:]), *empty_likes(v, *biases)]


def _fake_backward(do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, *rest):
    mixed = rest[-1]
    dwritten, dkept = written if wants_written(kept, mixed) else None, kept if mixed else None
    return empty_likes(q, k, v, first, mask, rows, dwritten, dkept, factor, gamma, beta, first_bias)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rows, Tensor written, Tensor? kept, Tensor? factor, Tensor? gamma, "
    "Tensor? beta, Tensor first, Tensor? first_bias"
)
_FORM = "int size, bool residual, float eps, float curvature, float gain, bool before"
forward = operator(  # o, last, starts, gradient and, with biases, last_bias, start_biases
    f"mini_batch_forward({_INPUTS}, {_FORM}) -> Tensor[]", _forward, _fake_forward
)
backward = operator(
    # dq, dk, dv, dfirst and of dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dfirst_bias those that were given and are wanted;
    # mixed: that of kept is or, where there are no masks, that of written
    f"mini_batch_backward(Tensor do, Tensor? dlast, Tensor? dlast_bias, {_INPUTS}, Tensor starts, Tensor gradient, "
    f"Tensor? start_biases, {_FORM}, bool mixed) -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip
_gradients = gradients(backward, DUAL)


class MiniBatches(torch.autograd.Function):
    """(q, k, ..., first_bias, *form) -> o, last, starts, gradient, the biases of last and starts."""

    @staticmethod
    def forward(*args):
        out = forward(*args)
        return tuple(out) if len(out) == 6 else (*out, None, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[TENSORS:]
        _, _, starts, gradient, _, start_biases = output
        ctx.mark_non_differentiable(*(x for x in (starts, gradient, start_biases) if x is not None))
        ctx.save_for_backward(*inputs[:TENSORS], starts, gradient, start_biases)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlast, _starts, _gradient, dlast_bias, _start_biases):
        *inputs, starts, gradient, start_biases = ctx.saved_tensors
        q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias = inputs
        do = torch.zeros_like(v) if do is None else do
        if dlast is None and dlast_bias is not None:
            dlast = torch.zeros_like(first)
        if dlast is not None and dlast_bias is None and first_bias is not None:
            dlast_bias = torch.zeros_like(first_bias)
        mixed = ctx.needs_input_grad[5 if kept is None else 6]
        some = written if wants_written(kept, mixed) else None, kept if mixed else None
        wanted = q, k, v, first, mask, rows, *some, factor, gamma, beta, first_bias
        dq, dk, dv, dfirst, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dbias = _gradients(
            wanted, do, dlast, dlast_bias, *inputs, starts, gradient, start_biases, *ctx.form, mixed
        )
        return dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dfirst, dbias, *[None] * len(ctx.form)


def mini_batches(*args) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, k, ..., first_bias, *form) -> o, the last slots, their biases."""
    if not differentiated(args[:TENSORS]):
        out = forward(*args)
        return out[0], out[1], out[4] if len(out) == 6 else None
    o, last, _, _, last_bias, _ = apply(MiniBatches, *args)
    return o, last, last_bias
