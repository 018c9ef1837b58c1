"""The one autograd.Function around the two operators."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401  (it registers the operators)


class ScalarGate(torch.autograd.Function):
    """(q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, learned) -> o, last, saved."""

    @staticmethod
    def forward(*args):
        return torch.ops.ttr.scalar_gate_forward.default(*args[:-1], True, args[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, scale, erase, look_before, read_before, learned = inputs
        ctx.rule, ctx.learned = (scale, erase, look_before, read_before), learned
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx, do, dlast, _):
        q, k, v, log_decay, weight, initial, cu_seqlens, saved = ctx.saved_tensors
        if do is None:
            if dlast is None:
                return (None,) * 12
            do = v.new_zeros((*q.shape[:2], *v.shape[-2:]))
        learned = ctx.learned
        backward = Backward.apply if torch.is_grad_enabled() else Backward.forward
        got = iter(backward(do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved, *ctx.rule, learned))
        dq, dk, dv = next(got), next(got), next(got)
        dlog_decay = next(got) if learned else None
        dweight = None if weight is None else next(got)
        dinitial = None if initial is None else next(got)
        return dq, dk, dv, dlog_decay, dweight, dinitial, None, None, None, None, None, None


def apply(function: type[torch.autograd.Function], *args):
    """Function.apply; without what it does for default arguments at every call, which no caller here leaves to it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class Backward(torch.autograd.Function):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.scalar_gate_backward.default(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("path='triton' has no second derivative; use path='chunk' (or recurrent) where a gradient is differentiated")


def scalar_gate(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, weight: Tensor | None, initial: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, erase: bool, look_before: bool, read_before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the last state; nothing is kept for backward where nothing requires a gradient."""
    args = (q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before)
    if not differentiated(args[:6]):
        o, last, _ = torch.ops.ttr.scalar_gate_forward.default(*args, False, False)
        return o, last
    o, last, _ = apply(ScalarGate, *args, log_decay is not None and log_decay.requires_grad)
    return o, last


def differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a gradient is wanted; forward mode counts, so that the Function refuses it."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
