"""ttr::least_squares_forward and ttr::least_squares_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. In float32: log_decay, weight None, [Hv] or [B, T, Hv]; ridge [Hv, dk];
first_G, last_G [N, Hv, dk, dv] and first_H, last_H [N, Hv, dk, dk], the first None where nothing was read. cu_seqlens: [N + 1]
int32, with B = 1. x, [B, T, Hv, dk], and `saved` are empty unless save. learned: the log decay wants a gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..autograd import apply, differentiated
from ..ops import _on_cpu, _on_its_device, _ready, _saved
from ..shapes import sizes_of

TENSORS = 9  # the first arguments of an operator
library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? weight, Tensor ridge, Tensor? first_G, Tensor? first_H, Tensor? cu_seqlens"
)
_FORM = "float scale, int iterations, float tolerance, bool before"
library.define(
    f"least_squares_forward({_INPUTS}, {_FORM}, bool save, bool learned)"
    " -> (Tensor o, Tensor last_G, Tensor last_H, Tensor x, Tensor saved)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    # dq, dk, dv, dridge and, where they were given, dlog_decay (if learned), dweight, dfirst_G, dfirst_H
    f"least_squares_backward(Tensor do, Tensor? dlast_G, Tensor? dlast_H, {_INPUTS}, Tensor x, Tensor saved, {_FORM}, bool learned)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@cache
def _form(*numbers):
    from .plan import Form

    return Form(*numbers)


def _forward(q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, scale, iterations, tolerance, before, save, learned):
    from . import run

    given: Any = _ready(q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens)
    rest: Any = _form(scale, iterations, tolerance, before), save, learned
    o, last_G, last_H, x, saved = run.forward(*given, *rest)
    return o, last_G, last_H, x if save else q.new_empty(0), saved


def _backward(
    do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, x, saved,
    scale, iterations, tolerance, before, learned,
):  # fmt: skip
    from . import run

    given: Any = _ready(do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, x, saved)
    rest: Any = _form(scale, iterations, tolerance, before), learned
    dq, dk, dv, dlog_decay, dweight, dridge, dfirst_G, dfirst_H = run.backward(*given, *rest)
    if dlog_decay is not None and log_decay.ndim == 1:
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
    size = _saved(x, v, log_decay, cu_seqlens, False, before, learned)
    return o, last_G, last_H, x, v.new_empty((size,), dtype=torch.uint8)


def _fake_backward(do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, *rest):
    like = [q, k, v, ridge, log_decay if rest[-1] else None, weight, first_G, first_H]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like if x is not None]


for _name, _kernel, _fake in (
    ("least_squares_forward", _forward, _fake_forward),
    ("least_squares_backward", _backward, _fake_backward),
):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)


class LeastSquares(torch.autograd.Function):
    """(q, k, ..., cu_seqlens, *form, learned) -> o, last_G, last_H, x, saved."""

    @staticmethod
    def forward(*args):
        return torch.ops.ttr.least_squares_forward.default(*args[:-1], True, args[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form, ctx.learned = inputs[TENSORS:-1], inputs[-1]
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output[3:])

    @staticmethod
    def backward(ctx, do, dlast_G, dlast_H, _x, _saved):
        *inputs, x, saved = ctx.saved_tensors
        _, _, v, _, weight, _, first_G, first_H, _ = inputs
        do = torch.zeros_like(v) if do is None else do
        backward = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
        got = iter(backward(do, dlast_G, dlast_H, *inputs, x, saved, *ctx.form, ctx.learned))
        dq, dk, dv, dridge = (next(got) for _ in range(4))
        dlog_decay = next(got) if ctx.learned else None
        dweight, dfirst_G, dfirst_H = (None if x is None else next(got) for x in (weight, first_G, first_H))
        return dq, dk, dv, dlog_decay, dweight, dridge, dfirst_G, dfirst_H, *[None] * (len(ctx.form) + 2)


class Gradients(torch.autograd.Function):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.least_squares_backward.default(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("path='triton' has no second derivative, nor has another path of least squares solved by cg")


def least_squares(*args) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, ..., cu_seqlens, *form) -> o, the last G and H; nothing is kept for backward where nothing requires a gradient."""
    if not differentiated(args[: TENSORS - 1]):
        return torch.ops.ttr.least_squares_forward.default(*args, False, False)[:3]
    log_decay = args[3]
    return apply(LeastSquares, *args, log_decay is not None and log_decay.requires_grad)[:3]
