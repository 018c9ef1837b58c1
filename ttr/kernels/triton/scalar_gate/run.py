"""The launches of one call, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs import Config
from ..launch import prepare
from .plan import Rule, backward_plan, forward_plan, kind_of


def forward(
    q, k, v, log_decay, weight, initial, cu_seqlens,
    scale: float, rule: Rule, config: Config, segments: int, save: bool, learned: bool = True,
):  # fmt: skip
    """o, the last state and what backward needs (`shapes.saved`), or without save what was needed here."""
    if q.is_cuda:
        prepare()
    p = forward_plan(kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments), save, learned)
    s = p.kind.sizes
    kept: dict[str, Any] = {name: q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in p.shapes.items()}
    o, last = torch.empty_like(v), q.new_empty((s.N, s.HV, s.dk, s.dv), dtype=torch.float32)
    names = "decays", "bounds", "inverse", "reads", "error", "checkpoints"
    decays, bounds, inverse, reads, error, checkpoints = (kept.get(name) for name in names)
    if p.gated:
        p.cumulate(log_decay, decays, bounds, cu_seqlens, s.N, s.T, p.decay_stride)
    if rule.erase:
        p.inverse(q, k, decays, weight, inverse, reads, bounds, cu_seqlens, s.N, s.T, scale, p.weight_stride)
    inputs = q, k, v, decays, bounds, weight, inverse, reads
    rest = cu_seqlens, p.blocks, s.T, scale, segments, p.segment_chunks, p.weight_stride
    start = initial
    if segments > 1:
        start, transfer, local = kept["starts"], kept["transfer"], torch.empty_like(kept["starts"])
        p.local(*inputs, None, o, None, None, local, transfer, *rest)
        p.joined(initial, local, transfer, start, segments)
    p.whole(*inputs, start, o, error, checkpoints, last, None, *rest)
    return o, last, list(kept.values())


def backward(
    do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, saved: Sequence[Tensor],
    scale: float, rule: Rule, config: Config, segments: int, learned: bool = True,
):  # fmt: skip
    """dq, dk, dv, dlog_decay, dweight, dinitial; None for what was not given. learned: whether dlog_decay is wanted."""
    if q.is_cuda:
        prepare()
    kind = kind_of(q, v, log_decay, weight, initial, cu_seqlens, rule, config, segments)
    p = backward_plan(kind, dlast is not None, learned)
    s, empty, learned = kind.sizes, q.new_empty, p.learned
    kept = dict(zip(p.shapes, saved, strict=True))
    decays, bounds, inverse, reads, checkpoints = (kept.get(name) for name in ("decays", "bounds", "inverse", "reads", "checkpoints"))
    scanned = s.T, scale, segments, p.segment_chunks, p.weight_stride
    weights = weight if rule.erase else None

    dv = torch.empty_like(v)
    first = None if initial is None else torch.empty_like(initial)
    gradients = empty((p.blocks, s.HV, s.dk, s.dv)) if learned else None
    inputs = q, k, decays, bounds, weights, inverse, reads, do
    start, end = initial, dlast
    if segments > 1:
        start = kept["starts"]
        local, end = torch.empty_like(start), torch.empty_like(start)
        p.local(*inputs, None, None, None, local, cu_seqlens, p.blocks, *scanned)
        p.joined(dlast, local, kept["transfer"], end, segments)
        del local
    p.whole(*inputs, end, dv, gradients, first, cu_seqlens, p.blocks, *scanned)
    carried = None
    if learned:
        carried = empty((p.blocks, s.HV), dtype=torch.float32)
        p.carried(checkpoints, gradients, decays, carried, cu_seqlens, s.N, s.T)
    del gradients  # before dq and dk are there

    per_token = (*q.shape[:2], s.HV)
    dweight = None if weight is None else empty(per_token, dtype=torch.float32)
    written, read_pairs, look_pairs = v, None, None
    if rule.erase:
        written = kept["error"]
        read_pairs, look_pairs = (empty((s.tokens, s.HV, config.chunk)) for _ in range(2))
        p.pairs(written, do, dv, decays, weight, read_pairs, look_pairs, dweight, cu_seqlens, s.N, s.T, scale, p.weight_stride)
    elif weight is not None:
        written = torch.empty_like(v)
        p.weigh(v, weight, dv, dweight, written, s.tokens, p.weight_stride)

    dq, dk = (empty((s.tokens, s.HV, s.dk)) for _ in range(2))
    taken = given = leaving = unseen = None
    if learned:  # partial sums per tile of key channels
        per_tile = ((n, s.tokens, s.HV) for n in (p.reader_tiles, p.writer_tiles, p.writer_tiles))
        taken, given, leaving = (empty(shape, dtype=torch.float32) for shape in per_tile)
        unseen = torch.empty_like(taken) if p.hidden else None
    p.readers(q, k, written, do, dv, read_pairs, look_pairs, decays, weights, start, dq, dk, taken, unseen, cu_seqlens, s.tokens, *scanned)
    p.keys(q, k, written, dv, do, read_pairs, decays, weights, end, dk, given, leaving, cu_seqlens, s.tokens, *scanned)

    dlog_decay = None
    if learned:
        dlog_decay = empty(per_token, dtype=torch.float32)
        at_start = None if initial is None else (initial * first).sum((2, 3))
        p.decay_gradient(taken, unseen, given, leaving, carried, at_start, dlog_decay, cu_seqlens, s.N, s.T, s.tokens)
    group = s.HV // s.H
    dq, dk = (x.view(q.shape) if group == 1 else x.view(*q.shape[:3], group, s.dk).sum(3) for x in (dq, dk))
    return dq, dk, dv, dlog_decay, dweight, first
