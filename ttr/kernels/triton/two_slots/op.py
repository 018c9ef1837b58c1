"""ttr::two_slots_forward and ttr::two_slots_backward, importable without triton, and the autograd.Function around them.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. In float32: numbers [10, B, T, Hv], of every token and head A_00, A_01,
b_0, A_10, A_11, b_1, c_0, c_1, r_0, r_1 (`two_slots`); first (or None), last: [N, Hv, 2, dk, dv]. cu_seqlens: [N + 1] int32,
with B = 1. erase: the error is taken at the states. before: queries read before their token's update.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..autograd import apply, differentiated
from ..ops import _on_cpu, _on_its_device, _ready
from ..shapes import sizes_of
from .tiling import tiling_of

TENSORS = 6  # the first arguments of an operator
library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor numbers, Tensor? first, Tensor? cu_seqlens"
_RULE = "float scale, bool erase, bool before"
library.define(
    # o, last and, with save, reads and, with erase, error and inverse
    f"two_slots_forward({_INPUTS}, {_RULE}, bool save) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    # dq, dk, dv, dnumbers and, where it was given, dfirst
    f"two_slots_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor[] saved, {_RULE}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@cache
def _rule(erase: bool, before: bool):
    from .run import Rule

    return Rule(erase, before)


def _forward(q, k, v, numbers, first, cu_seqlens, scale, erase, before, save):
    from . import run

    given: Any = *_ready(q, k, v, numbers, first, cu_seqlens), scale, _rule(erase, before), save
    o, last, saved = run.forward(*given)
    return [o, last, *saved]


def _backward(do, dlast, q, k, v, numbers, first, cu_seqlens, saved, scale, erase, before):
    from . import run

    given: Any = *_ready(do, dlast, q, k, v, numbers, first, cu_seqlens), saved, scale, _rule(erase, before)
    return [x for x in run.backward(*given) if x is not None]


def _like(*tensors: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def _fake_forward(q, k, v, numbers, first, cu_seqlens, scale, erase, before, save):
    s = sizes_of(q, v, cu_seqlens)
    out = [*_like(v), v.new_empty((s.N, s.HV, 2, s.dk, s.dv), dtype=torch.float32)]
    if save:
        reads = q.new_empty((*q.shape[:2], s.HV, tiling_of(q.dtype, q.device.type).chunk))
        out += [reads, *_like(v, reads)] if erase else [reads]
    return out


def _fake_backward(do, dlast, q, k, v, numbers, first, *rest):
    return _like(q, k, v, numbers, first)


for _name, _kernel, _fake in (("two_slots_forward", _forward, _fake_forward), ("two_slots_backward", _backward, _fake_backward)):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)


class TwoSlots(torch.autograd.Function):
    """(q, k, v, numbers, first, cu_seqlens, scale, erase, before) -> o, last, *saved."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.two_slots_forward.default(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule = inputs[TENSORS:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output[2:])

    @staticmethod
    def backward(ctx, do, dlast, *_saved):
        q, k, v, numbers, first, cu_seqlens, *saved = ctx.saved_tensors
        if do is None:
            if dlast is None:
                return (None,) * 9
            do = torch.zeros_like(v)
        backward = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
        dq, dk, dv, dnumbers, *dfirst = backward(do, dlast, q, k, v, numbers, first, cu_seqlens, *saved, *ctx.rule)
        return dq, dk, dv, dnumbers, dfirst[0] if dfirst else None, None, None, None, None


class Gradients(torch.autograd.Function):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        given, saved, rule = args[: TENSORS + 2], args[TENSORS + 2 : -3], args[-3:]
        return tuple(torch.ops.ttr.two_slots_backward.default(*given, list(saved), *rule))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("path='triton' has no second derivative; use path='chunk' (or recurrent) where a gradient is differentiated")


def two_slots(*args) -> tuple[Tensor, Tensor]:
    """(q, k, v, numbers, first, cu_seqlens, scale, erase, before) -> o and the last states."""
    if not differentiated(args[:5]):
        o, last = torch.ops.ttr.two_slots_forward.default(*args, False)
        return o, last
    return apply(TwoSlots, *args)[:2]
