"""The launches of one call, forward and backward."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import configs
from ..launch import prepare
from ..least_squares.plan import Form
from ..least_squares.run import for_each_memory, of_ridges, solve_exactly
from ..vector_gate import run as vector_gate
from ..vector_gate.config import Choice
from ..vector_gate.config import choose as choose_gate
from ..vector_gate.plan import rule_of
from .matrices import gradients_of_matrices
from .plan import Plan, kind_of, plan, segments_of


class Statistics(NamedTuple):
    """What `prepare` makes, and H before every chunk as the solve takes it; plain: as it is, where that was asked for."""

    made: dict[str, Tensor]
    states: Tensor
    sizes: Tensor
    plain: Tensor | None


def statistics(p: Plan, k, log_decay, weight, first_H, cu_seqlens, plain: bool) -> tuple[Statistics, Tensor]:
    """And H behind the last token, [N, Hv, dk, dk]."""
    s, empty = p.kind.sizes, k.new_empty
    made = {name: empty(shape, dtype=dtype) for name, (shape, dtype) in p.made().items()}
    p.prepare()(k, log_decay, weight, *made.values(), cu_seqlens, s.N, s.T, p.weight_stride)
    matrices = p.chunks, s.HV, s.dk, s.dk
    states, sizes = empty(matrices, dtype=p.operand), empty((p.chunks, s.HV), dtype=torch.float32)
    unscaled = empty(matrices) if plain else None
    last = empty((s.N, s.HV, s.dk, s.dk), dtype=torch.float32)
    scanned = [made[name] for name in ("writes", "added", "gains", "left", "middles")]
    rest = cu_seqlens, p.chunks, s.T, p.segments, p.segment_chunks
    start = first_H
    if p.segments > 1:
        local, start, transfer = segments_of(p, k)
        p.statistics(True, False)(*scanned, None, None, None, None, local, transfer, *rest)
        p.join(first_H is not None, False)(first_H, local, transfer, start, p.segments)
    p.statistics(False, plain)(*scanned, start, states, sizes, unscaled, last, None, *rest)
    return Statistics(made, states, sizes, unscaled), last


def solve(
    p: Plan, given: Statistics, q, k, log_decay, weight, ridge, other, cu_seqlens, form: Form, scale: float
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x [B, T, Hv, dk], and with another right-hand side's solution -x_t other_t, as `ridge` is."""
    s, made, one = p.kind.sizes, given.made, ridge.ndim == 2
    if form.iterations is None:
        H = cast(Tensor, given.plain)
        x = solve_exactly(s, p.kind.options.chunk, H, None, q, k, log_decay, weight, ridge, cu_seqlens, form, scale)
        return x, of_ridges(x, other, one)
    x = q.new_empty((*q.shape[:2], s.HV, s.dk))
    again = one and other is not None
    dridge = q.new_empty((p.chunks, s.HV, s.dk), dtype=torch.float32) if again else None
    tolerance = max(form.tolerance, p.kind.options.finest)
    rest = x, other if again else None, dridge, cu_seqlens, s.N, s.T, p.chunks, scale, form.iterations, tolerance
    for far, decays in ((False, made["lookers"]), (True, made["sums"])):
        launch = p.solve(q.shape[2], again, far, not one)
        launch(q, made["keys"], made["written"], decays, given.states, given.sizes, made["far"], ridge, *rest)
    return x, of_ridges(x, other, one) if dridge is None else dridge.sum(0)


def choose(k: Tensor, width: int, HV: int, cu_seqlens: Tensor | None) -> Choice:
    """How `vector_gate` runs values of `width` channels."""
    n = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return choose_gate(configs.arch_of(k.device), k.dtype, k.shape[3], width, False, False, n * HV, k.shape[1])


def forward(
    q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, form: Form, save: bool, learned: bool
):  # fmt: skip
    """o, the last G and H, x, and what backward wants of `vector_gate`."""
    if q.is_cuda:
        prepare()
    p = plan(kind_of(k, v, log_decay, weight, first_H, cu_seqlens, form.before))
    given, last_H = statistics(p, k, log_decay, weight, first_H, cu_seqlens, form.iterations is None)
    x, _ = solve(p, given, q, k, log_decay, weight, ridge, None, cu_seqlens, form, form.scale)
    del given
    HV, dv = v.shape[2:]
    config, segments, room = choose(k, dv, HV, cu_seqlens)
    inputs = x, for_each_memory(k, HV), v, None, log_decay, weight, first_G, cu_seqlens
    rule = rule_of(False, False, False, form.before)
    o, last_G, saved = vector_gate.forward(*inputs, 1.0, rule, config, segments, save, room)
    return o, last_G, last_H, x, saved


def backward(
    do, dlast_G, dlast_H, q, k, v, log_decay, weight, ridge, first_G, first_H, cu_seqlens, x, saved, form: Form, learned: bool
):  # fmt: skip
    """dq, dk, dv, dlog_decay, dweight, dridge, and of the first G and H; None for what was not given."""
    if q.is_cuda:
        prepare()
    H, (HV, dv), rule = k.shape[2], v.shape[2:], rule_of(False, False, False, form.before)
    keys = for_each_memory(k, HV)
    config, segments, room = choose(k, dv, HV, cu_seqlens)
    decays = log_decay.float()  # of which the gradient comes in two parts, rounded together
    inputs = x, keys, v, None, decays, weight, first_G, cu_seqlens
    dx, dkeys, dv_, _, dlog_decay, dweight, dfirst_G = vector_gate.backward(
        do, dlast_G, *inputs, saved, 1.0, rule, config, segments, learned, room
    )

    p = plan(kind_of(k, v, log_decay, weight, first_H, cu_seqlens, form.before))
    given, _ = statistics(p, k, log_decay, weight, first_H, cu_seqlens, True)
    dq, dridge = solve(p, given, dx, k, log_decay, weight, ridge, x, cu_seqlens, form, 1.0)
    plain, left = given.plain, given.made["left"]
    del given, dx

    config = choose(k, k.shape[3], HV, cu_seqlens).config
    by_key, by_decay, by_weight, dfirst_H = gradients_of_matrices(
        p, config, x, dq, keys, decays, weight, plain, left, dlast_H, first_H, cu_seqlens, learned
    )
    dkeys += by_key
    if by_decay is not None:
        dlog_decay = (dlog_decay + by_decay).to(log_decay.dtype)
    if by_weight is not None:
        dweight = dweight + by_weight
    if form.scale != 1.0:
        dq *= form.scale
    if HV != H:
        dq, dkeys = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dkeys))
    return dq, dkeys, dv_, dlog_decay, dweight, dridge, dfirst_G, dfirst_H
