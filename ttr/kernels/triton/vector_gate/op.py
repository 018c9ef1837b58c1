"""ttr::vector_gate_forward and ttr::vector_gate_backward, importable without triton, and the autograd.Function around them.

q, k, p: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. p None: what is written of v has no keys of its own. log_decay: [Hv, dk]
or [B, T, Hv, dk], of any dtype; weight, of the keys as they write: None, [Hv] or [B, T, Hv], float32, or [B, T, Hv, dk], of any
dtype. initial, last: [N, Hv, dk, dv], float32. cu_seqlens: [N + 1] int32, with B = 1. `saved` is empty unless save.
The configuration and the number of segments follow from the sizes and the device, inside.
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from .. import configs
from ..operators import CHUNK, apply, differentiated, empty_likes, gradients, operator, ready
from ..shapes import sizes_of
from .config import Choice, choose, saved

TENSORS = 8  # the first arguments of an operator


def _choose(q: Tensor, v: Tensor, p: Tensor | None, erase: bool, cu_seqlens: Tensor | None) -> Choice:
    """Heads and channels are numbers, N and T may be symbols."""
    Hv, dv = index(v.shape[2]), index(v.shape[3])
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return choose(configs.arch_of(q.device), q.dtype, index(q.shape[3]), dv, erase, p is not None, n * Hv, q.shape[1])


def saved_size(q: Tensor, v: Tensor, p: Tensor | None, erase: bool, cu_seqlens: Tensor | None) -> int:
    """Bytes."""
    config, _, room = _choose(q, v, p, erase, cu_seqlens)
    return saved(sizes_of(q, v, cu_seqlens), q.dtype, erase, p is not None, config, room, cu_seqlens is not None).size


def _forward(q, k, v, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save):
    from . import run
    from .plan import rule_of

    config, segments, room = _choose(q, v, p, erase, cu_seqlens)
    given: Any = ready(q, k, v, p, log_decay, weight, initial, cu_seqlens)
    rest: Any = scale, rule_of(erase, p is not None, look_before, read_before), config, segments, save, room
    return run.forward(*given, *rest)


def _backward(
    do, dlast, q, k, v, p, log_decay, weight, initial, cu_seqlens, kept, scale, erase, look_before, read_before, learned,
):  # fmt: skip
    from . import run
    from .plan import rule_of

    config, segments, room = _choose(q, v, p, erase, cu_seqlens)
    given: Any = ready(do, dlast, q, k, v, p, log_decay, weight, initial, cu_seqlens, kept)
    rest: Any = scale, rule_of(erase, p is not None, look_before, read_before), config, segments, learned, room
    dq, dk, dv, dp, dlog_decay, dweight, dinitial = run.backward(*given, *rest)
    if dlog_decay is not None and log_decay.ndim == 2:
        dlog_decay = dlog_decay.sum((0, 1))
    if dweight is not None and weight.ndim == 1:
        dweight = dweight.sum((0, 1))
    return [x for x in (dq, dk, dv, dp, dlog_decay, dweight, dinitial) if x is not None]


def _fake_forward(q, k, v, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save):
    s = sizes_of(q, v, cu_seqlens)
    o, last = torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    return o, last, v.new_empty((saved_size(q, v, p, erase, cu_seqlens) if save else 0,), dtype=torch.uint8)


def _fake_backward(do, dlast, q, k, v, p, log_decay, weight, initial, cu_seqlens, *rest):
    return empty_likes(q, k, v, p, log_decay if rest[-1] else None, weight, initial)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? p, Tensor log_decay, Tensor? weight, Tensor? initial, Tensor? cu_seqlens"
_RULE = "float scale, bool erase, bool look_before, bool read_before"
forward = operator(f"vector_gate_forward({_INPUTS}, {_RULE}, bool save) -> (Tensor o, Tensor last, Tensor saved)", _forward, _fake_forward)
backward = operator(  # dq, dk, dv and, where they were given, dp, dlog_decay (if learned), dweight, dinitial
    f"vector_gate_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor saved, {_RULE}, bool learned) -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip
_gradients = gradients(backward, CHUNK)


class VectorGate(torch.autograd.Function):
    """(q, k, v, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before) -> o, last, saved."""

    @staticmethod
    def forward(*args):
        return forward(*args, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule = inputs[TENSORS:]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], output[2])

    @staticmethod
    def backward(ctx, do, dlast, _):
        *inputs, kept = ctx.saved_tensors
        if do is None:
            if dlast is None:
                return (None,) * (TENSORS + 4)
            do = torch.zeros_like(inputs[2])
        learned = ctx.needs_input_grad[4]
        wanted = *inputs[:4], inputs[4] if learned else None, *inputs[5:7]
        return *_gradients(wanted, do, dlast, *inputs, kept, *ctx.rule, learned), None, None, None, None, None


def vector_gate(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, log_decay: Tensor, weight: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, scale: float, erase: bool, look_before: bool, read_before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the last state; nothing is kept for backward where nothing requires a gradient."""
    args = (q, k, v, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before)
    if not differentiated(args[: TENSORS - 1]):
        o, last, _ = forward(*args, False)
        return o, last
    o, last, _ = apply(VectorGate, *args)
    return o, last
