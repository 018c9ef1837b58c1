"""ttr::vector_gate_forward and ttr::vector_gate_backward, importable without triton, and the autograd.Function around them.

q, k, p: [B, T, H, dk]; v: [B, T, Hv, dv]; w: [B, T, Hv, dk], of one dtype; w None: weight times k. p None: what is written of v has
no keys of its own. log_decay: [Hv, dk] or [B, T, Hv, dk], of any dtype; weight: None, [Hv] or [B, T, Hv], float32. initial,
last: [N, Hv, dk, dv], float32. cu_seqlens: [N + 1] int32, with B = 1. `saved` is empty unless save.
The configuration and the number of segments follow from the sizes and the device, inside.
"""

from __future__ import annotations

from functools import cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from .. import configs
from ..autograd import apply, differentiated
from ..ops import _on_cpu, _on_its_device, _ready
from ..shapes import sizes_of
from .config import Choice, choose, saved

TENSORS = 9  # the first arguments of an operator
library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? w, Tensor? p, Tensor log_decay, Tensor? weight, Tensor? initial, Tensor? cu_seqlens"
_RULE = "float scale, bool erase, bool look_before, bool read_before"
library.define(
    f"vector_gate_forward({_INPUTS}, {_RULE}, bool save) -> (Tensor o, Tensor last, Tensor saved)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    # dq, dk, dv and, where they were given, dw, dp, dlog_decay (if learned), dweight, dinitial
    f"vector_gate_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor saved, {_RULE}, bool learned) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@cache
def _rule(erase: bool, tied: bool, added: bool, look_before: bool, read_before: bool):
    from .run import Rule

    return Rule(erase, tied, added, look_before, read_before)


def _choose(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Choice:
    """Heads and channels are numbers, N and T may be symbols."""
    Hv, dv = index(v.shape[2]), index(v.shape[3])
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return choose(configs.arch_of(q.device), q.dtype, index(q.shape[3]), dv, n * Hv, q.shape[1])


def _forward(q, k, v, w, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save):
    from . import run

    config, segments, room = _choose(q, v, cu_seqlens)
    given: Any = _ready(q, k, v, w, p, log_decay, weight, initial, cu_seqlens)
    rest: Any = scale, _rule(erase, w is None, p is not None, look_before, read_before), config, segments, save, room
    return run.forward(*given, *rest)


def _backward(
    do, dlast, q, k, v, w, p, log_decay, weight, initial, cu_seqlens, kept, scale, erase, look_before, read_before, learned,
):  # fmt: skip
    from . import run

    config, segments, room = _choose(q, v, cu_seqlens)
    given: Any = _ready(do, dlast, q, k, v, w, p, log_decay, weight, initial, cu_seqlens, kept)
    rest: Any = scale, _rule(erase, w is None, p is not None, look_before, read_before), config, segments, learned, room
    dq, dk, dv, dw, dp, dlog_decay, dweight, dinitial = run.backward(*given, *rest)
    if dlog_decay is not None and log_decay.ndim == 2:
        dlog_decay = dlog_decay.sum((0, 1))
    if dweight is not None and weight.ndim == 1:
        dweight = dweight.sum((0, 1))
    return [x for x in (dq, dk, dv, dw, dp, dlog_decay, dweight, dinitial) if x is not None]


def _fake_forward(q, k, v, w, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save):
    s = sizes_of(q, v, cu_seqlens)
    o, last = torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    config, _, room = _choose(q, v, cu_seqlens)
    return o, last, v.new_empty((saved(s, q.dtype, erase, config, room).size if save else 0,), dtype=torch.uint8)


def _fake_backward(
    do, dlast, q, k, v, w, p, log_decay, weight, initial, cu_seqlens, kept, scale, erase, look_before, read_before, learned,
):  # fmt: skip
    like = [q, k, v, w, p, log_decay if learned else None, weight, initial]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like if x is not None]


for _name, _kernel, _fake in (("vector_gate_forward", _forward, _fake_forward), ("vector_gate_backward", _backward, _fake_backward)):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)


class VectorGate(torch.autograd.Function):
    """(q, k, v, w, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before) -> o, last, saved."""

    @staticmethod
    def forward(*args):
        return torch.ops.ttr.vector_gate_forward.default(*args, True)

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
        learned = ctx.needs_input_grad[5]
        backward = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
        got = iter(backward(do, dlast, *inputs, kept, *ctx.rule, learned))
        log_decay = inputs[5] if learned else None
        given = *inputs[:5], log_decay, *inputs[6:8]
        return *(None if x is None else next(got) for x in given), None, None, None, None, None


class Gradients(torch.autograd.Function):
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong."""

    @staticmethod
    def forward(*args):
        return tuple(torch.ops.ttr.vector_gate_backward.default(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("path='triton' has no second derivative; use path='chunk' (or recurrent) where a gradient is differentiated")


def vector_gate(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, p: Tensor | None, log_decay: Tensor, weight: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, scale: float, erase: bool, look_before: bool, read_before: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the last state; nothing is kept for backward where nothing requires a gradient."""
    args = (q, k, v, w, p, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before)
    if not differentiated(args[: TENSORS - 1]):
        o, last, _ = torch.ops.ttr.vector_gate_forward.default(*args, False)
        return o, last
    o, last, _ = apply(VectorGate, *args)
    return o, last
