"""The launches of one call, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs import Config
from ..launch import prepare
from .plan import Rule, backward_plan, forward_plan, kind_of

# the arrays of `shapes.saved` and of `Backward.work`; a call has some of them
KEPT = "decays", "bounds", "inverse", "reads", "error", "checkpoints"
WORK = "read_pairs", "look_pairs", "taken", "given", "leaving", "unseen", "asked", "carried"


def forward(
    q, k, v, log_decay, weight, initial, cu_seqlens,
    scale: float, rule: Rule, config: Config, segments: int, save: bool, learned: bool = True, room: int | None = None,
):  # fmt: skip
    """o, the last state and what backward needs (`shapes.saved`), or without save an empty tensor. room: of `kind_of`."""
    if q.is_cuda:
        prepare()
    p = forward_plan(kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments, room), save, learned)
    s = p.kind.sizes
    buffer = p.kept.make(q)
    kept = p.kept.arrays(buffer)
    o, last = q.new_empty((*q.shape[:2], s.HV, s.dv)), q.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    decays, bounds, inverse, reads, error, checkpoints = (kept.get(name) for name in KEPT)
    if p.gated:
        p.cumulate(log_decay, decays, bounds, cu_seqlens, s.N, s.T, p.decay_stride)
    if rule.erase:
        p.inverse(q, k, decays, weight, inverse, reads, bounds, cu_seqlens, s.N, s.T, scale, p.weight_stride)
    inputs = q, k, v, decays, bounds, weight, inverse, reads
    rest = cu_seqlens, p.blocks, s.T, scale, segments, p.segment_chunks, p.weight_stride
    start = initial
    if segments > 1:
        start, transfer, local = kept["starts"], kept["transfer"], q.new_empty((s.N * segments * s.HV, s.dk, s.dv), dtype=torch.float32)
        p.local(*inputs, None, o, None, None, local, transfer, *rest)
        p.joined(initial, local, transfer, start, segments)
    p.whole(*inputs, start, o, error, checkpoints, last, None, *rest)
    return o, last, buffer if save else q.new_empty((0,), dtype=torch.uint8)


def backward(
    do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved: Tensor,
    scale: float, rule: Rule, config: Config, segments: int, learned: bool = True, room: int | None = None,
):  # fmt: skip
    """dq, dk, dv, dlog_decay, dweight, dinitial; None for what was not given. learned: whether dlog_decay is wanted."""
    if q.is_cuda:
        prepare()
    kind = kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments, room)
    p = backward_plan(kind, dlast is not None, learned)
    s, empty, learned = kind.sizes, q.new_empty, p.learned
    kept = p.kept.arrays(saved)
    decays, bounds, inverse, reads, error, checkpoints = (kept.get(name) for name in KEPT)
    scanned = s.T, scale, segments, p.segment_chunks, p.weight_stride
    weights = weight if rule.erase else None

    dv = torch.empty_like(v)
    first = None if initial is None else torch.empty_like(initial)
    gradients = empty((p.blocks, s.HV, s.dk, s.dv)) if learned else None
    inputs = q, k, decays, bounds, weights, inverse, reads, do
    start, end = initial, dlast
    if segments > 1:
        start = kept["starts"]
        local, end = (empty((s.N * segments * s.HV, s.dk, s.dv), dtype=torch.float32) for _ in range(2))
        p.local(*inputs, None, None, None, local, cu_seqlens, p.blocks, *scanned)
        p.joined(dlast, local, kept["transfer"], end, segments)
        del local
    p.whole(*inputs, end, dv, gradients, first, cu_seqlens, p.blocks, *scanned)
    buffer = p.work.make(q)
    work = p.work.arrays(buffer)
    read_pairs, look_pairs, taken, given, leaving, unseen, asked, carried = (work.get(name) for name in WORK)
    if learned:
        p.carried(checkpoints, gradients, decays, carried, cu_seqlens, s.N, s.T)
    del gradients  # before dq and dk are there

    per_token, per_event = (*q.shape[:2], s.HV), v.shape[:-1]
    dweight = None if weight is None else empty(per_event, dtype=torch.float32)
    written = v
    if rule.erase:
        written = error
        p.pairs(written, do, dv, decays, weight, read_pairs, look_pairs, dweight, cu_seqlens, s.N, s.T, scale, p.weight_stride)
    elif weight is not None:
        written = torch.empty_like(v)
        p.weigh(v, weight, dv, dweight, written, s.events, p.weight_stride)

    dq, dk = (empty((*lead, s.dk)) for lead in (per_token, per_event))
    inputs = q, k, written, do, dv, read_pairs, look_pairs, decays, weights
    p.readers(*inputs, start, dq, dk, taken, unseen, asked, cu_seqlens, s.events, *scanned)
    p.keys(q, k, written, dv, do, read_pairs, decays, weights, end, dk, given, leaving, cu_seqlens, s.events, *scanned)

    dlog_decay = None
    if learned:
        dlog_decay = empty(per_token, dtype=torch.float32)
        at_start = None if initial is None else (initial * first).sum((2, 3))
        p.decay_gradient(taken, unseen, asked, given, leaving, carried, at_start, dlog_decay, cu_seqlens, s.N, s.T, s.events)
    if s.HV != s.H:
        dq, dk = (x.unflatten(-2, (s.H, -1)).sum(-2) for x in (dq, dk))
    return dq, dk, dv, dlog_decay, dweight, first
