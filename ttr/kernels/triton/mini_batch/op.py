"""ttr::mini_batch_forward and ttr::mini_batch_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype, T a multiple of the mini-batch b. In float32, for the T / b mini-batches of
a row: mask R [B, T / b, Hv, b, b], rows Q0 and written F [B, T / b, Hv, r, b], kept phi [B, T / b, Hv, r, r]; gamma, beta
[Hv, dv] or None; first, last [B, Hv, r, dk, dv], their biases [B, Hv, r, dv] or None.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..autograd import apply, differentiated
from ..ops import _on_cpu, _on_its_device, _ready

library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor mask, Tensor rows, Tensor written, Tensor kept, Tensor? gamma, Tensor? beta, Tensor first, "
    "Tensor? first_bias"
)
_FORM = "bool residual, float eps, float curvature, float gain"
library.define(
    # o, last, starts, gradient and, with biases, last_bias, start_biases
    f"mini_batch_forward({_INPUTS}, {_FORM}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    # dq, dk, dv, dmask, drows, dwritten, dfirst and, where they were given, dgamma, dbeta, dfirst_bias and (if mixed) dkept
    f"mini_batch_backward(Tensor do, Tensor dlast, Tensor? dlast_bias, {_INPUTS}, Tensor starts, Tensor gradient, "
    f"Tensor? start_biases, {_FORM}, bool mixed) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@cache
def _form(*numbers):
    from .run import Form

    return Form(*numbers)


def _forward(q, k, v, mask, rows, written, kept, gamma, beta, first, first_bias, *form):
    from . import run

    given: Any = *_ready(q, k, v, mask, rows, written, kept, gamma, beta, first, first_bias), _form(*form)
    o, last, last_bias, starts, start_biases, gradient = run.forward(*given)
    return [x for x in (o, last, starts, gradient, last_bias, start_biases) if x is not None]


def _backward(
    do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, gamma, beta, first, first_bias, starts, gradient, start_biases,
    *options,
):  # fmt: skip
    from . import run

    given: Any = _ready(do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, gamma, beta)
    *form, mixed = options
    rest: Any = first_bias, starts, start_biases, gradient, _form(*form), mixed
    got = run.backward(*given, *rest)
    *many, dkept, dgamma, dbeta, dfirst, dfirst_bias = got
    return [*many, dfirst, *(x for x in (dgamma, dbeta, dfirst_bias, dkept) if x is not None)]


def _like(*tensors: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def _fake_forward(q, k, v, mask, rows, written, kept, gamma, beta, first, first_bias, *form):
    B, M, Hv, r = rows.shape[:4]
    starts = q.new_empty(B, M, Hv, r, *first.shape[3:])
    biases = [] if first_bias is None else [first_bias, first_bias.new_empty(B, M, Hv, r, v.shape[3])]
    return [*_like(v, first), starts, *_like(v, *biases)]


def _fake_backward(do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, gamma, beta, first, first_bias, *rest):
    return _like(q, k, v, mask, rows, written, first, gamma, beta, first_bias, kept if rest[-1] else None)


for _name, _kernel, _fake in (("mini_batch_forward", _forward, _fake_forward), ("mini_batch_backward", _backward, _fake_backward)):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)


class MiniBatches(torch.autograd.Function):
    """(q, k, v, mask, rows, written, kept, gamma, beta, first, first_bias, *form) -> o, last, starts, gradient, the biases of both."""

    @staticmethod
    def forward(*args):
        out = torch.ops.ttr.mini_batch_forward.default(*args)
        return tuple(out) if len(out) == 6 else (*out, None, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[11:]
        _, _, starts, gradient, _, start_biases = output
        ctx.mark_non_differentiable(*(x for x in (starts, gradient, start_biases) if x is not None))
        ctx.save_for_backward(*inputs[:11], starts, gradient, start_biases)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlast, _starts, _gradient, dlast_bias, _start_biases):
        *inputs, starts, gradient, start_biases = ctx.saved_tensors
        v, gamma, first, first_bias = inputs[2], inputs[7], inputs[9], inputs[10]
        do = torch.zeros_like(v) if do is None else do
        dlast = torch.zeros_like(first) if dlast is None else dlast
        if first_bias is not None and dlast_bias is None:
            dlast_bias = torch.zeros_like(first_bias)
        backward = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
        mixed = ctx.needs_input_grad[6]
        got = iter(backward(do, dlast, dlast_bias, *inputs, starts, gradient, start_biases, *ctx.form, mixed))
        many, dfirst = [next(got) for _ in range(6)], next(got)
        dgamma, dbeta = (next(got), next(got)) if gamma is not None else (None, None)
        dfirst_bias = None if first_bias is None else next(got)
        return *many, next(got) if mixed else None, dgamma, dbeta, dfirst, dfirst_bias, None, None, None, None


class Gradients(torch.autograd.Function):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.mini_batch_backward.default(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("path='triton' has no second derivative; use path='dual' where a gradient is differentiated")


def mini_batches(*args) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, ..., first_bias, residual, eps, curvature, gain) -> o, the last slots, their biases."""
    if not differentiated(args[:11]):
        out = torch.ops.ttr.mini_batch_forward.default(*args)
        return out[0], out[1], out[4] if len(out) == 6 else None
    o, last, _, _, last_bias, _ = apply(MiniBatches, *args)
    return o, last, last_bias
