"""ttr::least_squares_forward and ttr::least_squares_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. In float32: log_decay, weight None, [Hv] or [B, T, Hv]; ridge [Hv, dk], or
[B, T, Hv, dk] where every token has one; first_G, last_G [N, Hv, dk, dv] and first_H, last_H [N, Hv, dk, dk], the first None where
nothing was read. A decay a key channel, [Hv, dk] or [B, T, Hv, dk], comes in any dtype. cu_seqlens: [N + 1] int32, with B = 1.
x, [B, T, Hv, dk], and `saved` are empty unless save. learned: the log decay wants a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import apply, differentiated, empty_likes, gradients, operator, ready
from ..scalar_gate.op import saved_size
from ..shapes import sizes_of
from ..vector_gate.op import saved_size as saved_by_channel

TENSORS = 9  # the first arguments of an operator


def _by_channel(log_decay: Tensor | None) -> bool:
    return log_decay is not None and log_decay.ndim in (2, 4)


def _kernels(log_decay: Tensor | None) -> Any:
    from ..least_squares_by_channel import run as by_channel
    from . import run as by_head

    return by_channel if _by_channel(log_decay) else by_head


def _forward(q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, scale, iterations, tolerance, before, save, learned):
    from .plan import form_of

    given: Any = ready(q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens)
    rest: Any = form_of(scale, iterations, tolerance, before), save, learned
    o, last_G, last_H, x, saved = _kernels(log_decay).forward(*given, *rest)
    return o, last_G, last_H, x if save else q.new_empty(0), saved


def _backward(
    do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, x, saved,
    scale, iterations, tolerance, before, learned,
):  # fmt: skip
    from .plan import form_of

    given: Any = ready(do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, x, saved)
    rest: Any = form_of(scale, iterations, tolerance, before), learned
    dq, dk, dv, dlog_decay, dweight, dridge, dfirst_G, dfirst_H = _kernels(log_decay).backward(*given, *rest)
    if dlog_decay is not None and log_decay.ndim in (1, 2):
        dlog_decay = dlog_decay.sum((0, 1))
    if dweight is not None and weight.ndim == 1:
        dweight = dweight.sum((0, 1))
    return [x for x in (dq, dk, dv, dridge, dlog_decay, dweight, dfirst_G, dfirst_H) if x is not None]


def _fake_forward(q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, scale, iterations, tolerance, before, save, learned):
    s, o = sizes_of(q, v, cu_seqlens), torch.empty_like(v, memory_format=torch.contiguous_format)
    last_G, last_H = (v.new_empty((s.N, s.HV, s.dk, d), dtype=torch.float32) for d in (s.dv, s.dk))
    if not save:
        return o, last_G, last_H, q.new_empty(0), v.new_empty((0,), dtype=torch.uint8)
    x = q.new_empty((*q.shape[:2], s.HV, s.dk))
    if _by_channel(log_decay):
        size = saved_by_channel(x, v, None, False, cu_seqlens)
    else:
        size = saved_size(x, v, log_decay, cu_seqlens, False, before, learned)
    return o, last_G, last_H, x, v.new_empty((size,), dtype=torch.uint8)


def _fake_backward(do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, *rest):
    return empty_likes(q, k, v, ridge, log_decay if rest[-1] else None, weight, first_G, first_H)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? weight, Tensor ridge, Tensor? first_G, Tensor? first_H, Tensor? cu_seqlens"
)
_FORM = "float scale, int? iterations, float tolerance, bool before"
forward = operator(
    f"least_squares_forward({_INPUTS}, {_FORM}, bool save, bool learned)"
    " -> (Tensor o, Tensor last_G, Tensor last_H, Tensor x, Tensor saved)",
    _forward, _fake_forward,
)  # fmt: skip
backward = operator(  # dq, dk, dv, dridge and, where they were given, dlog_decay (if learned), dweight, dfirst_G, dfirst_H
    f"least_squares_backward(Tensor do, Tensor? dlast_G, Tensor? dlast_H, {_INPUTS}, Tensor x, Tensor saved, {_FORM}, bool learned)"
    " -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip
_gradients = gradients(backward, "nor has least squares by cg on another path; with cholesky and rls, path='definition' has")


class LeastSquares(torch.autograd.Function):
    """(q, k, ..., cu_seqlens, *form, learned) -> o, last_G, last_H, x, saved."""

    @staticmethod
    def forward(*args):
        return forward(*args[:-1], True, args[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form, ctx.learned = inputs[TENSORS:-1], inputs[-1]
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output[3:])

    @staticmethod
    def backward(ctx, do, dlast_G, dlast_H, _x, _saved):
        *inputs, x, saved = ctx.saved_tensors
        q, k, v, log_decay, weight, ridge, first_G, first_H, _ = inputs
        do = torch.zeros_like(v) if do is None else do
        wanted = q, k, v, ridge, log_decay if ctx.learned else None, weight, first_G, first_H
        dq, dk, dv, dridge, dlog_decay, dweight, dfirst_G, dfirst_H = _gradients(
            wanted, do, dlast_G, dlast_H, *inputs, x, saved, *ctx.form, ctx.learned
        )
        return dq, dk, dv, dlog_decay, dweight, dridge, dfirst_G, dfirst_H, *[None] * (len(ctx.form) + 2)


def least_squares(*args) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, ..., cu_seqlens, *form) -> o, the last G and H; nothing is kept for backward where nothing requires a gradient."""
    if not differentiated(args[: TENSORS - 1]):
        return forward(*args, False, False)[:3]
    log_decay = args[3]
    return apply(LeastSquares, *args, log_decay is not None and log_decay.requires_grad)[:3]
