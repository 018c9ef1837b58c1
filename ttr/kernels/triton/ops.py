"""ttr::scalar_gate_forward and ttr::scalar_gate_backward: schemas and fake kernels, which need no triton.

q, k: [B, T, H, dk]; v: [B, T, Hv, dv], of one dtype. log_decay, weight: None, [Hv] or [B, T, Hv], float32. With n
micro-steps a token k, v and a weight per token have them after T. initial, last: [N, Hv, dk, dv], float32. o: [B, T, Hv, dv].
cu_seqlens: [N + 1] int32, with B = 1. `saved` is empty unless save. learned: the log decay wants a gradient.
The configuration and the number of segments follow from the sizes and the device, inside.
"""

from __future__ import annotations

from functools import cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from . import configs
from .eligible import interpreted
from .shapes import saved, sizes_of, steps_of

library = torch.library.Library("ttr", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? weight, Tensor? initial, Tensor? cu_seqlens"
_RULE = "float scale, bool erase, bool look_before, bool read_before"
library.define(
    f"scalar_gate_forward({_INPUTS}, {_RULE}, bool save, bool learned) -> (Tensor o, Tensor last, Tensor saved)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    # dq, dk, dv and, where they were given, dlog_decay (if learned), dweight, dinitial
    f"scalar_gate_backward(Tensor do, Tensor? dlast, {_INPUTS}, Tensor saved, {_RULE}, bool learned) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@cache
def _rule(erase: bool, look_before: bool, read_before: bool):
    from .scalar_gate.plan import Rule

    return Rule(erase, look_before, read_before)


def _choose(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, erase: bool) -> configs.Choice:
    """Heads and channels are numbers, N and T may be symbols."""
    Hv, dv = index(v.shape[-2]), index(v.shape[-1])
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return configs.choose(configs.arch_of(q.device), erase, index(q.shape[3]), dv, q.dtype, n * Hv, q.shape[1] * steps_of(v))


def _saved(q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, erase: bool, before: bool, learned: bool) -> int:
    """Bytes."""
    config, _, room = _choose(q, v, cu_seqlens, erase)
    config = configs.suited(config, before)
    gated, packed = log_decay is not None, cu_seqlens is not None
    return saved(sizes_of(q, v, cu_seqlens), q.dtype, config, room, erase=erase, gated=gated, learned=learned, packed=packed).size


def _ready(*tensors: Tensor | None) -> list[Any]:
    """Contiguous, and on the 16 bytes that the tensor memory accelerator asks for."""
    return [
        x if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0) else x.clone(memory_format=torch.contiguous_format)
        for x in tensors
    ]


def _forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save, learned):
    from .scalar_gate import run

    config, segments, room = _choose(q, v, cu_seqlens, erase)
    q, k, v, log_decay, weight, initial, cu_seqlens = _ready(q, k, v, log_decay, weight, initial, cu_seqlens)
    rule = _rule(erase, look_before, read_before)
    return run.forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale, rule, config, segments, save, learned, room)


def _backward(
    do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved, scale, erase, look_before, read_before, learned,
):  # fmt: skip
    from .scalar_gate import run

    config, segments, room = _choose(q, v, cu_seqlens, erase)
    given: Any = _ready(do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved)
    rest: Any = scale, _rule(erase, look_before, read_before), config, segments, learned, room
    dq, dk, dv, dlog_decay, dweight, dinitial = run.backward(*given, *rest)
    if dlog_decay is not None and log_decay.ndim == 1:
        dlog_decay = dlog_decay.sum((0, 1))
    if dweight is not None and weight.ndim == 1:
        dweight = dweight.flatten(0, -2).sum(0)
    return [x for x in (dq, dk, dv, dlog_decay, dweight, dinitial) if x is not None]


def _on_its_device(kernel):
    def call(q, *args):
        if q.get_device() == torch.cuda.current_device():
            return kernel(q, *args)
        with torch.cuda.device(q.get_device()):
            return kernel(q, *args)

    return call


def _on_cpu(kernel):
    def call(*args):
        if not interpreted():
            raise RuntimeError(
                "ttr's Triton kernels run on CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1 before triton is imported"
            )
        return kernel(*args)

    return call


def _fake_forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale, erase, look_before, read_before, save, learned):
    s = sizes_of(q, v, cu_seqlens)
    o, last = v.new_empty((*q.shape[:2], s.HV, s.dv)), v.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    size = _saved(q, v, log_decay, cu_seqlens, erase, look_before or read_before, learned) if save else 0
    return o, last, v.new_empty((size,), dtype=torch.uint8)


def _fake_backward(
    do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved, scale, erase, look_before, read_before, learned,
):  # fmt: skip
    like = [q, k, v, log_decay if learned else None, weight, initial]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like if x is not None]


for _name, _kernel, _fake in (
    ("scalar_gate_forward", _forward, _fake_forward),
    ("scalar_gate_backward", _backward, _fake_backward),
):
    library.impl(_name, _on_its_device(_kernel), "CUDA")
    library.impl(_name, _on_cpu(_kernel), "CPU")
    torch.library.register_fake(f"ttr::{_name}", _fake, lib=library)
