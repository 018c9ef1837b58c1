"""The launches of one call, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..launch import prepare
from ..scalar_gate import run as scalar_gate
from ..scalar_gate.plan import Rule
from ..shapes import Sizes
from .plan import Exact, Form, Plan, exact, kind_of, plan


class Statistics(NamedTuple):
    """H before every chunk as the solve takes it, and the chunks' decays."""

    states: Tensor
    sizes: Tensor
    decays: Tensor | None


def statistics(p: Plan, k, log_decay, weight, first_H, cu_seqlens) -> tuple[Statistics, Tensor]:
    """And H behind the last token, [N, Hv, dk, dk]."""
    s, empty = p.kind.sizes, k.new_empty
    decays = bounds = None
    if p.gated:
        decays, bounds = empty((s.tokens, s.HV), dtype=p.decays_dtype), empty((p.blocks, s.HV), dtype=torch.float32)
        p.cumulate(log_decay, decays, bounds, cu_seqlens, s.N, s.T, p.decay_stride)
    states, sizes = empty((p.blocks * s.HV, s.dk, s.dk), dtype=p.operand), empty((p.blocks, s.HV), dtype=torch.float32)
    last = empty((s.N, s.HV, s.dk, s.dk), dtype=torch.float32)
    rest = cu_seqlens, p.blocks, s.T, p.segments, p.segment_chunks, p.weight_stride
    start = first_H
    if p.segments > 1:
        pieces = s.N * p.segments * s.HV
        local, start = (empty((pieces, s.dk, s.dk), dtype=torch.float32) for _ in range(2))
        transfer = empty((pieces,), dtype=torch.float32)
        p.local(k, decays, bounds, weight, None, states, sizes, local, transfer, *rest)
        p.joined(first_H, local, transfer, start, p.segments)
    p.whole(k, decays, bounds, weight, start, states, sizes, last, None, *rest)
    return Statistics(states, sizes, decays), last


def solve(
    p: Plan, given: Statistics, q, k, log_decay, weight, ridge, other, cu_seqlens, form: Form, scale: float
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x [B, T, Hv, dk], and with another right-hand side's solution -x_t other_t, as `ridge` is."""
    s, one = p.kind.sizes, ridge.ndim == 2
    if form.iterations is None:
        x = solve_exactly(s, p.kind.options.chunk, given.states, given.sizes, q, k, log_decay, weight, ridge, cu_seqlens, form, scale)
        return x, of_ridges(x, other, one)
    x = k.new_empty((*k.shape[:2], s.HV, s.dk))
    again = one and other is not None
    dridge = k.new_empty((p.blocks, s.HV, s.dk), dtype=torch.float32) if again else None
    tolerance = max(form.tolerance, p.kind.options.finest)
    p.solve(q.shape[2], again, not one)(
        q, k, given.states, given.sizes, given.decays, weight, ridge, x, other if again else None, dridge, cu_seqlens,
        s.N, s.T, p.blocks, scale, form.iterations, tolerance, p.weight_stride,
    )  # fmt: skip
    return x, of_ridges(x, other, one) if dridge is None else dridge.sum(0)


def solve_exactly(
    s: Sizes, chunk: int, H: Tensor, sizes: Tensor | None, q, k, log_decay, weight, ridge, cu_seqlens, form: Form, scale: float
) -> Tensor:  # fmt: skip
    """x, of H before every chunk, divided by `sizes` if they are given. All but the decay is in float32."""
    x = torch.empty((*k.shape[:2], s.HV, s.dk), dtype=torch.float32, device=k.device)
    log_decay_axes, weight_axes = (None if given is None else given.ndim for given in (log_decay, weight))
    kind = Exact(
        s, chunk, sizes is not None, q.shape[2], log_decay_axes, None if log_decay is None else log_decay.dtype, weight_axes,
        cu_seqlens is not None, form.before, k.get_device(),
    )  # fmt: skip
    strides = s.HV if weight_axes == 3 else 0, {3: s.HV, 4: s.HV * s.dk}.get(log_decay_axes or 0, 0), s.HV * s.dk if ridge.ndim == 4 else 0
    exact(kind)(q, k, H, sizes, log_decay, weight, ridge, x, cu_seqlens, s.N, s.T, scale, *strides)
    return x


def of_ridges(x: Tensor, other: Tensor | None, one: bool) -> Tensor | None:
    """-x_t other_t, of every token or of all."""
    if other is None:
        return None
    return -(x * other).sum((0, 1)) if one else -(x * other)


def for_each_memory(k: Tensor, HV: int) -> Tensor:
    """k of a head for every value head that shares it."""
    return k if k.shape[2] == HV else k.repeat_interleave(HV // k.shape[2], 2)


def choose(k: Tensor, width: int, HV: int, cu_seqlens: Tensor | None) -> configs.Choice:
    """How `scalar_gate` runs values of `width` channels."""
    n = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return configs.choose(configs.arch_of(k.device), False, k.shape[3], width, k.dtype, n * HV, k.shape[1])


def forward(
    q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, form: Form, save: bool, learned: bool
):  # fmt: skip
    """o, the last G and H, x, and what backward wants of `scalar_gate`."""
    if q.is_cuda:
        prepare()
    p = plan(kind_of(k, v, log_decay, weight, first_H, cu_seqlens, form.before))
    given, last_H = statistics(p, k, log_decay, weight, first_H, cu_seqlens)
    x, _ = solve(p, given, q, k, log_decay, weight, ridge, None, cu_seqlens, form, form.scale)
    del given
    HV, dv = v.shape[2:]
    config, segments, room = choose(k, dv, HV, cu_seqlens)
    rule, k = Rule(False, False, form.before), for_each_memory(k, HV)
    o, last_G, saved = scalar_gate.forward(
        x, k, v, log_decay, weight, first_G, cu_seqlens, 1.0, rule, config, segments, save, learned, room
    )
    return o, last_G, last_H, x, saved


def backward(
    do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, x, saved, form: Form, learned: bool
):  # fmt: skip
    """dq, dk, dv, dlog_decay, dweight, dridge, and of the first G and H; None for what was not given."""
    if q.is_cuda:
        prepare()
    H, (HV, dv), rule = k.shape[2], v.shape[2:], Rule(False, False, form.before)
    keys = for_each_memory(k, HV)
    config, segments, room = choose(k, dv, HV, cu_seqlens)
    dx, dkeys, dv_, dlog_decay, dweight, dfirst_G = scalar_gate.backward(
        do, dlast_G, x, keys, v, log_decay, weight, first_G, cu_seqlens, saved, 1.0, rule, config, segments, learned, room
    )

    p = plan(kind_of(k, v, log_decay, weight, first_H, cu_seqlens, form.before))
    given, _ = statistics(p, k, log_decay, weight, first_H, cu_seqlens)
    dq, dridge = solve(p, given, dx, k, log_decay, weight, ridge, x, cu_seqlens, form, 1.0)
    del given, dx

    # dH_t = -dq_t x_t^T: as if values k had been read with x, and -dq came back
    config, segments, room = choose(k, keys.shape[3], HV, cu_seqlens)
    inputs = x, keys, keys, log_decay, weight, first_H, cu_seqlens
    _, _, saved = scalar_gate.forward(*inputs, -1.0, rule, config, segments, True, learned, room)
    _, by_key, by_value, by_decay, by_weight, dfirst_H = scalar_gate.backward(
        dq, dlast_H, *inputs, saved, -1.0, rule, config, segments, learned, room
    )
    dkeys += by_key
    dkeys += by_value
    dlog_decay, dweight = (None if a is None else a + b for a, b in ((dlog_decay, by_decay), (dweight, by_weight)))
    if form.scale != 1.0:
        dq *= form.scale
    if HV != H:
        dq, dkeys = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dkeys))
    return dq, dkeys, dv_, dlog_decay, dweight, dridge, dfirst_G, dfirst_H
