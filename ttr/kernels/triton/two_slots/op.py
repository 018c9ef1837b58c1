"""ttr::two_slots_forward and ttr::two_slots_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. In float32: numbers [10, B, T, Hv], of every token and head A_00, A_01,
b_0, A_10, A_11, b_1, c_0, c_1, r_0, r_1 (`two_slots`); first (or None), last: [N, Hv, 2, dk, dv]. cu_seqlens: [N + 1] int32,
with B = 1. erase: the error is taken at the states. before: queries read before their token's update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import CHUNK, apply, differentiated, empty_likes, gradients, operator, ready
from ..shapes import sizes_of
from .tiling import tiling_of

TENSORS = 6  # the first arguments of an operator


def _forward(q, k, v, numbers, first, cu_seqlens, scale, erase, before, save):
    from . import run

    given: Any = *ready(q, k, v, numbers, first, cu_seqlens), scale, run.rule_of(erase, before), save
    o, last, saved = run.forward(*given)
    return [o, last, *saved]


def _backward(do, dlast, q, k, v, numbers, first, cu_seqlens, saved, scale, erase, before):
    from . import run

    given: Any = *ready(do, dlast, q, k, v, numbers, first, cu_seqlens), saved, scale, run.rule_of(erase, before)
    return [x for x in run.backward(*given) if x is not None]


def _fake_forward(q, k, v, numbers, first, cu_seqlens, scale, erase, before, save):
    s = sizes_of(q, v, cu_seqlens)
    out = [*empty_likes(v), v.new_empty((s.N, s.HV, 2, s.dk, s.dv), dtype=torch.float32)]
    if save:
        reads = q.new_empty((*q.shape[:2], s.HV, tiling_of(q.dtype, q.device.type).chunk))
        out += [reads, *empty_likes(v, reads)] if erase else [reads]
    return out


def _fake_backward(do, dlast, q, k, v, numbers, first, *rest):
    return empty_likes(q, k, v, numbers, first)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor numbers, Tensor? first, Tensor? cu_seqlens"
_RULE = "float scale, bool erase, bool before"
forward = operator(  # o, last and, with save, reads and, with erase, error and inverse
    f"two_slots_forward({_INPUTS}, {_RULE}, bool save) -> Tensor[]", _forward, _fake_forward
)
backward = operator(  # dq, dk, dv, dnumbers and, where it was given, dfirst
    f"two_slots_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor[] saved, {_RULE}) -> Tensor[]", _backward, _fake_backward
)


def _flat(*args):
    """`backward` of what forward kept one by one: autograd does not look into a list."""
    given, saved, rule = args[: TENSORS + 2], args[TENSORS + 2 : -3], args[-3:]
    return backward(*given, list(saved), *rule)


_gradients = gradients(_flat, CHUNK)


class TwoSlots(torch.autograd.Function):
    """(q, k, v, numbers, first, cu_seqlens, scale, erase, before) -> o, last, *saved."""

    @staticmethod
    def forward(*args):
        return tuple(forward(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule = inputs[TENSORS:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output[2:])

    @staticmethod
    def backward(ctx, do, dlast, *_saved):
        inputs = ctx.saved_tensors[:TENSORS]
        if do is None:
            if dlast is None:
                return (None,) * 9
            do = torch.zeros_like(inputs[2])
        return *_gradients(inputs[:-1], do, dlast, *ctx.saved_tensors, *ctx.rule), None, None, None, None


def two_slots(*args) -> tuple[Tensor, Tensor]:
    """(q, k, v, numbers, first, cu_seqlens, scale, erase, before) -> o and the last states."""
    if not differentiated(args[:5]):
        o, last = forward(*args, False)
        return o, last
    return apply(TwoSlots, *args)[:2]
