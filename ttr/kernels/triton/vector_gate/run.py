"""The launches of one call, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import prepare
from .config import Config
from .plan import Plan, Rule, kind_of, plan_of

ROWS = "queries", "looks", "writes", "added"  # of a chunk's tokens
BETWEEN = "reads", "added_reads", "added_errors", "added_looks", "left", "far"  # of a chunk


def forward(
    q, k, v, p, log_decay, weight, initial, cu_seqlens,
    scale: float, rule: Rule, config: Config, segments: int, save: bool, room: int | None = None,
):  # fmt: skip
    """o, the last state and what backward needs (`saved`), or without save an empty tensor. room: of `kind_of`."""
    if q.is_cuda:
        prepare()
    plan = plan_of(kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments, room), save, False, False)
    s = plan.kind.sizes
    buffer, scratch = plan.kept.make(q), plan.made.make(q)
    kept = plan.kept.arrays(buffer)
    made = kept | plan.made.arrays(scratch)
    o, last = torch.empty_like(v), q.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    inverse = kept.get("inverse")
    prepare_chunks(plan, q, k, p, log_decay, weight, inverse, made, cu_seqlens, scale)
    rows, (reads, added_reads, added_errors, _, left, _) = (tuple(made.get(name) for name in names) for names in (ROWS, BETWEEN))
    inputs = *rows, added_errors if rule.added else inverse, reads, added_reads, left, v
    scanned = cu_seqlens, s.T, segments, plan.segment_chunks
    start = initial
    if segments > 1:
        start, transfer, local = kept["starts"], kept["transfer"], q.new_empty((s.N * segments * s.HV, s.dk, s.dv), dtype=torch.float32)
        plan.forward(True)(*inputs, None, None, None, local, transfer, *scanned)
        plan.join(initial is not None, False)(initial, local, transfer, start, segments)
    plan.forward(False)(*inputs, start, o, kept.get("error"), last, None, *scanned)
    return o, last, buffer if save else q.new_empty((0,), dtype=torch.uint8)


def prepare_chunks(plan: Plan, q, k, p, log_decay, weight, inverse, made: dict[str, Any], cu_seqlens, scale: float) -> None:
    """made: of them, what `plan.made` lays out, and what is kept."""
    rows, rest = (tuple(made.get(name) for name in names) for names in (ROWS, BETWEEN))
    s, given = plan.kind.sizes, (q, k, p, log_decay, weight, inverse, *rows, *rest, cu_seqlens)
    plan.prepare()(*given, s.N, s.T, scale, plan.weight_stride)
    plan.prepare_far()(*given, s.N, s.T, plan.chunks * s.HV, scale, plan.weight_stride)


def backward(
    do, dlast, q, k, v, p, log_decay, weight, initial, cu_seqlens, buffer: Tensor,
    scale: float, rule: Rule, config: Config, segments: int, learned: bool = True, room: int | None = None,
):  # fmt: skip
    """dq, dk, dv, dp, dlog_decay, dweight, dinitial; None for what was not given. learned: whether dlog_decay is wanted."""
    if q.is_cuda:
        prepare()
    kind = kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments, room)
    plan = plan_of(kind, True, dlast is not None, learned)
    s, empty = kind.sizes, q.new_empty
    kept, scratch = plan.kept.arrays(buffer), plan.again.make(q)
    made = kept | plan.again.arrays(scratch)
    inverse, error = kept.get("inverse"), kept.get("error", v)
    rows, (reads, added_reads, _, added_looks, left, far) = (tuple(made.get(name) for name in names) for names in (ROWS, BETWEEN))
    if plan.again.places:
        plan.rows()(q, k, p, log_decay, weight, inverse, *rows, cu_seqlens, s.N, s.T, scale, plan.weight_stride)
    queries, looks, writes, added = rows
    scanned = cu_seqlens, plan.chunks * s.HV, s.T, segments, plan.segment_chunks
    start = kept["starts"] if segments > 1 else initial
    states, gradients = (empty((plan.chunks, s.HV, s.dk, s.dv)) for _ in range(2))
    plan.states()(writes, added, left, error, v, start, states, *scanned)

    derror = torch.empty_like(v)
    first = None if initial is None else torch.empty_like(initial)
    inputs = queries, looks, writes, inverse, reads, left, do
    end = dlast
    if segments > 1:
        local, end = (empty((s.N * segments * s.HV, s.dk, s.dv), dtype=torch.float32) for _ in range(2))
        plan.reverse(True)(*inputs, None, None, None, local, *scanned)
        plan.join(dlast is not None, True)(dlast, local, kept["transfer"], end, segments)
        del local
    plan.reverse(False)(*inputs, end, derror, gradients, first, *scanned)
    del scratch, made, inputs, rows, queries, looks, writes, added, end

    wanted = True, rule.erase, rule.added, rule.added
    dpairs = [empty((s.tokens, s.HV, config.chunk)) if there else None for there in wanted]
    plan.pairs()(error, v, do, derror, *dpairs, cu_seqlens, s.N, s.T, scale)
    given = q, k, p, log_decay, weight, states, gradients, error, v, do, derror, *dpairs, None, far
    dq, dk, dp, dlog_decay, dweight = of_chunks(plan, given, cu_seqlens, scale)
    del given, states, dpairs
    dv = derror
    if rule.added:
        dv = torch.empty_like(v)
        plan.values()(p, log_decay, added_reads, added_looks, gradients, do, derror, dv, cu_seqlens, s.N, s.T)
    if s.HV != s.H:
        dq, dk, dp = (None if x is None else x.unflatten(2, (s.H, -1)).sum(3) for x in (dq, dk, dp))
    return dq, dk, dv, dp, dlog_decay, dweight, first


def of_chunks(plan: Plan, given: tuple, cu_seqlens, scale: float):
    """dq, dk, dp, [B, T, Hv, dk], dlog_decay and dweight from what is `given` of every chunk: the kernels' first arguments."""
    q, _, p, log_decay, weight, *_, value_left, _ = given
    s, empty = plan.kind.sizes, q.new_empty
    per_head = (*q.shape[:2], s.HV, s.dk)
    dq, dk = empty(per_head), empty(per_head)
    dp = None if p is None else empty(per_head)
    dlog_decay = empty(per_head, dtype=log_decay.dtype) if plan.learned else None
    by_channel = plan.kind.weight == 4
    if by_channel:
        dweight = torch.empty_like(weight)
    else:
        dweight = None if weight is None else empty((plan.key_tiles, *q.shape[:2], s.HV), dtype=torch.float32)
    wanted = dq, dk, dp, dlog_decay, dweight
    plan.gradients(value_left is not None)(*given, *wanted, cu_seqlens, s.N, s.T, s.tokens, scale, plan.weight_stride)
    rest = plan.chunks * s.HV, scale, plan.weight_stride
    plan.gradients_far(value_left is not None)(*given, *wanted, cu_seqlens, s.N, s.T, s.tokens, *rest)
    if dweight is not None and not by_channel:
        dweight = dweight.sum(0) if plan.key_tiles > 1 else dweight[0]
    return dq, dk, dp, dlog_decay, dweight
