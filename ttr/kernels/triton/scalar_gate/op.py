"""ttr::scalar_gate_forward and ttr::scalar_gate_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. log_decay, weight: None, [Hv] or [B, T, Hv], float32. With n
micro-steps a token k, v and a weight per token have them after T. initial, last: [N, Hv, dk, dv], float32. o: [B, T, Hv, dv].
cu_seqlens: [N + 1] int32, with B = 1. `saved` is empty unless save. learned: the log decay wants a gradient.
The configuration and the number of segments follow from the sizes and the device, inside.
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from .. import configs
from ..operators import CHUNK, apply, differentiated, empty_likes, gradients, operator, ready
from ..shapes import saved, sizes_of, steps_of


def _choose(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, erase: bool) -> configs.Choice:
    """Heads and channels are numbers, N and T may be symbols."""
    Hv, dv = index(v.shape[-2]), index(v.shape[-1])
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return configs.choose(configs.arch_of(q.device), erase, index(q.shape[3]), dv, q.dtype, n * Hv, q.shape[1] * steps_of(v))


def saved_size(q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, erase: bool, before: bool, learned: bool) -> int:
    """Bytes."""
    config, _, room = _choose(q, v, cu_seqlens, erase)
    config = configs.suited(config, before)
    gated, packed = log_decay is not None, cu_seqlens is not None
    return saved(sizes_of(q, v, cu_seqlens), q.dtype, config, room, erase=erase, gated=gated, learned=learned, packed=packed).size


def _forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save, learned):
    from . import plan, run

    config, segments, room = _choose(q, v, cu_seqlens, erase)
    q, k, v, log_decay, weight, initial, cu_seqlens = ready(q, k, v, log_decay, weight, initial, cu_seqlens)
    rule = plan.rule_of(erase, look_before, read_before)
    return run.forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale, rule, config, segments, save, learned, room)


def _backward(
    do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved, scale, erase, look_before, read_before, learned,
):  # fmt: skip
    from . import plan, run

    config, segments, room = _choose(q, v, cu_seqlens, erase)
    given = ready(do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved)
    rest: Any = scale, plan.rule_of(erase, look_before, read_before), config, segments, learned, room
    dq, dk, dv, dlog_decay, dweight, dinitial = run.backward(*given, *rest)
    if dlog_decay is not None and log_decay.ndim == 1:
        dlog_decay = dlog_decay.sum((0, 1))
    if dweight is not None and weight.ndim == 1:
        dweight = dweight.flatten(0, -2).sum(0)
    return [x for x in (dq, dk, dv, dlog_decay, dweight, dinitial) if x is not None]


def _fake_forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save, learned):
    s = sizes_of(q, v, cu_seqlens)
    o, last = v.new_empty((*q.shape[:2], s.HV, s.dv)), v.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    size = saved_size(q, v, log_decay, cu_seqlens, erase, look_before or read_before, learned) if save else 0
    return o, last, v.new_empty((size,), dtype=torch.uint8)


def _fake_backward(do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, *rest):
    return empty_likes(q, k, v, log_decay if rest[-1] else None, weight, initial)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? weight, Tensor? initial, Tensor? cu_seqlens"
_RULE = "float scale, bool erase, bool look_before, bool read_before"
forward = operator(
    f"scalar_gate_forward({_INPUTS}, {_RULE}, bool save, bool learned) -> (Tensor o, Tensor last, Tensor saved)",
    _forward, _fake_forward,
)  # fmt: skip
backward = operator(  # dq, dk, dv and, where they were given, dlog_decay (if learned), dweight, dinitial
    f"scalar_gate_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor saved, {_RULE}, bool learned) -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip
_gradients = gradients(backward, CHUNK)


class ScalarGate(torch.autograd.Function):
    """(q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, learned) -> o, last, saved."""

    @staticmethod
    def forward(*args):
        return forward(*args[:-1], True, args[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, scale, erase, look_before, read_before, learned = inputs
        ctx.rule, ctx.learned = (scale, erase, look_before, read_before), learned
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx, do, dlast, _):
        *inputs, saved = ctx.saved_tensors
        q, k, v, log_decay, weight, initial, _ = inputs
        if do is None:
            if dlast is None:
                return (None,) * 12
            do = v.new_zeros((*q.shape[:2], *v.shape[-2:]))
        wanted = q, k, v, log_decay if ctx.learned else None, weight, initial
        return *_gradients(wanted, do, dlast, *inputs, saved, *ctx.rule, ctx.learned), *[None] * 6


def scalar_gate(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, weight: Tensor | None, initial: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, erase: bool, look_before: bool, read_before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the last state; nothing is kept for backward where nothing requires a gradient."""
    args = (q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before)
    if not differentiated(args[:6]):
        o, last, _ = forward(*args, False, False)
        return o, last
    o, last, _ = apply(ScalarGate, *args, log_decay is not None and log_decay.requires_grad)
    return o, last
