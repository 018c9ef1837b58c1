"""The launches of one call, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..configs import Config
from ..launch import prepare
from ..shapes import ceil_div, power_of_two, saved, sizes_of
from .decays import carried_kernel, cumulate_kernel, decay_gradient_kernel
from .forward import forward_kernel
from .inverse import inverse_kernel
from .keys import keys_kernel
from .pairs import pairs_kernel
from .readers import readers_kernel
from .reverse import reverse_kernel
from .segments import segments_kernel


@dataclass(frozen=True)
class Rule:
    """What of the declaration the kernels know: the delta rule (erase) or the inner product, and who sees a token's decay."""

    erase: bool
    look_before: bool
    read_before: bool


MOST_MEMORIES = 65535  # what CUDA takes along a grid's second axis


class Plan:
    """What the launches of one call have in common."""

    def __init__(self, q, k, v, log_decay, weight, cu_seqlens, rule: Rule, config: Config, segments: int):
        if q.is_cuda:
            prepare()
        self.sizes = s = sizes_of(q, v, cu_seqlens)
        if s.N * s.HV > MOST_MEMORIES:
            raise ValueError(f"path='triton': {s.N} sequences x {s.HV} value heads; a launch takes {MOST_MEMORIES}: split the batch")
        self.config, self.rule, self.segments = config, rule, segments
        self.q, self.cu_seqlens, self.packed = q, cu_seqlens, cu_seqlens is not None
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.dk, self.dv = (max(16, power_of_two(d)) for d in (s.dk, s.dv))
        self.segment_chunks = ceil_div(ceil_div(s.T, config.chunk), segments)
        self.weight_stride = 0 if weight is None or weight.ndim == 1 else s.HV
        self.decays = None if log_decay is None else self.cumulate(log_decay)
        self.common = {
            "H": s.H, "HV": s.HV, "DK": s.dk, "C": config.chunk, "GATED": log_decay is not None, "WEIGHTED": weight is not None,
            "PACKED": self.packed, "PRECISION": self.precision,
        }  # fmt: skip
        self.scan = {**self.common, "DV": s.dv}
        self.rule_flags = {"ERASE": rule.erase, "LOOK_BEFORE": rule.look_before, "READ_BEFORE": rule.read_before}

    def empty(self, *shape: int, dtype=torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def states(self) -> Tensor:
        s = self.sizes
        return self.empty(s.N, self.segments, s.HV, s.dk, s.dv)

    def cumulate(self, log_decay: Tensor) -> Tensor:
        s, C, wide = self.sizes, self.config.chunk, self.precision == "tf32x3"
        decays = self.empty(s.tokens, s.HV, dtype=torch.float64 if wide else torch.float32)
        BH = min(16, power_of_two(s.HV))
        cumulate_kernel[(s.slots(C, self.packed), ceil_div(s.HV, BH))](
            log_decay, decays, self.cu_seqlens, s.N, s.T, 0 if log_decay.ndim == 1 else s.HV,
            HV=s.HV, BH=BH, C=C, WIDE=wide, PACKED=self.packed, num_warps=4,
        )  # fmt: skip
        return decays

    def scan_grid(self, width: int, tile: int, segments: int) -> tuple[int, int, int]:
        return ceil_div(width, tile), self.sizes.N * self.sizes.HV, segments

    def join(self, first, local, transfer, between, backward: bool) -> None:
        """States between segments from what each does alone."""
        s, launch = self.sizes, self.config.segments
        segments_kernel[(ceil_div(s.dv, launch.tile), s.N * s.HV)](
            first, local, transfer, between, self.segments,
            HV=s.HV, DK=s.dk, DV=s.dv, BK=self.dk, BV=launch.tile, ERASE=self.rule.erase,
            STARTED=first is not None, BACKWARD=backward, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


def forward(q, k, v, log_decay, weight, initial, cu_seqlens, scale: float, rule: Rule, config: Config, segments: int, save: bool):
    """o, last state, and what backward needs: inverse, reads, error, checkpoints, starts, transfer (empty where there is nothing)."""
    p = Plan(q, k, v, log_decay, weight, cu_seqlens, rule, config, segments)
    s = p.sizes
    o, last = torch.empty_like(v), p.empty(s.N, s.HV, s.dk, s.dv)
    inverse, reads, error, checkpoints, starts, transfer = (
        q.new_empty(shape, dtype=dtype)
        for shape, dtype in saved(
            s, v, config, segments if segments > 1 else 0, erase=rule.erase, gated=log_decay is not None, packed=p.packed, save=save
        )
    )
    blocks = s.slots(config.chunk * config.every, p.packed)
    if rule.erase:
        launch = config.inverse
        inverse_kernel[(s.slots(config.chunk, p.packed), s.H)](
            q, k, p.decays, weight, inverse, reads, cu_seqlens, s.N, s.T, scale, p.weight_stride,
            BK=p.dk, LOOK_BEFORE=rule.look_before, READ_BEFORE=rule.read_before, **p.common,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def scan(start, last, transfer, local: bool) -> None:
        launch = config.local if local else config.forward
        tiles = ceil_div(s.dv, launch.tile) + (ceil_div(s.dk, launch.tile) if local and rule.erase else 0)
        # backward wants the transfer of the last segment, forward only what lies before it
        forward_kernel[(tiles, s.N * s.HV, segments - 1 if local and not save else segments)](
            q, k, v, p.decays, weight, inverse, reads, start, o, error, checkpoints, last, transfer, cu_seqlens,
            blocks, s.T, scale, segments, p.segment_chunks, p.weight_stride,
            BK=p.dk, BV=launch.tile, STARTED=start is not None, LOCAL=local, SAVE=save and not local,
            EVERY=config.every, CHECKPOINT=checkpoints.numel() > 0, **p.scan, **p.rule_flags,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    if segments > 1:
        local = p.states()
        scan(None, local, transfer, True)
        p.join(initial, local, transfer, starts, backward=False)
        scan(starts, last, None, False)
    else:
        scan(initial, last, None, False)
    return o, last, inverse, reads, error, checkpoints, starts, transfer


def backward(
    do, dlast, q, k, v, log_decay, weight, initial, cu_seqlens, inverse, reads, error, checkpoints, starts, transfer,
    scale: float, rule: Rule, config: Config, segments: int, learned: bool = True,
):  # fmt: skip
    """dq, dk, dv, dlog_decay, dweight, dinitial; None for what was not given. learned: whether dlog_decay is wanted."""
    p = Plan(q, k, v, log_decay, weight, cu_seqlens, rule, config, segments)
    s, group = p.sizes, v.shape[2] // q.shape[2]
    learned = learned and log_decay is not None
    error = error if rule.erase else v
    start = starts if segments > 1 else initial
    do = do.contiguous()
    dv, first = torch.empty_like(v), p.empty(s.N, s.HV, s.dk, s.dv)
    launch = config.reverse
    dweight = None if weight is None else p.empty(ceil_div(s.dv, launch.tile), s.tokens, s.HV)
    slots, blocks = (s.slots(config.chunk * n, p.packed) for n in (1, config.every))
    gradients = p.empty(blocks, s.HV, s.dk, s.dv, dtype=q.dtype) if learned else None

    def scan(end, first, local: bool) -> None:
        reverse_kernel[p.scan_grid(s.dv, launch.tile, segments - 1 if local else segments)](
            q, k, error, p.decays, weight, inverse, reads, do, end, dv, dweight, gradients, first, cu_seqlens, s.tokens, blocks, s.T,
            scale, segments, p.segment_chunks, p.weight_stride,
            BK=p.dk, BV=launch.tile, EVERY=config.every, LEAST_WEIGHT=2.0**-14 if q.dtype == torch.float16 else 1e-30,
            STARTED=end is not None, LEARNED=learned, LOCAL=local, **p.scan, **p.rule_flags,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    end = dlast
    if segments > 1:
        local, end = p.states(), p.states()
        scan(None, local, True)
        p.join(dlast, local, transfer, end, backward=True)
    scan(end, first, False)

    launch, kinds = config.readers, 2 if rule.erase else 1
    tiles = ceil_div(s.dk, launch.tile)
    dq, dk = (q.new_empty(s.tokens, s.HV, s.dk) for _ in range(2))
    within, leaving, entering, carried = (
        p.empty(n, m, s.HV) if learned else None for n, m in ((1, s.tokens), (tiles, s.tokens), (kinds * tiles, s.tokens), (1, blocks))
    )
    if learned:
        carried_kernel[(blocks, s.HV)](
            checkpoints, gradients, p.decays, carried, cu_seqlens, s.N, s.T,
            HV=s.HV, DK=s.dk, DV=s.dv, BK=p.dk, BV=min(p.dv, 64), C=config.chunk, EVERY=config.every, PACKED=p.packed, num_warps=4,
        )  # fmt: skip
    launch, C = config.pairs, config.chunk
    reads, looks = p.empty(s.tokens, s.HV, C, dtype=q.dtype), p.empty(s.tokens, s.HV, C, dtype=q.dtype) if rule.erase else None
    own = None if rule.read_before else p.empty(s.tokens, s.HV)
    pairs_kernel[(slots, s.HV)](
        q, k, error, do, dv, p.decays, weight, reads, looks, own, within, cu_seqlens, s.N, s.T, scale, p.weight_stride,
        BK=p.dk, BV=p.dv, LEARNED=learned, **p.scan, **p.rule_flags, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    launch = config.readers
    readers = [(q, do, reads, dq, scale, rule.read_before)] + ([(k, dv, looks, dk, -1.0, rule.look_before)] if rule.erase else [])
    for look, (reader, out, pairs, dreader, factor, before) in enumerate(readers):
        readers_kernel[p.scan_grid(s.dk, launch.tile, segments)](
            reader, k, error, out, pairs, own, p.decays, weight, start, dreader, entering, cu_seqlens,
            s.tokens, s.T, factor, segments, p.segment_chunks, p.weight_stride,
            BK=launch.tile, BV=p.dv, STARTED=start is not None, LEARNED=learned, LOOK=bool(look), BEFORE=before,
            **p.scan, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    launch = config.keys
    keys_kernel[p.scan_grid(s.dk, launch.tile, segments)](
        q, k, error, dv, do, reads, own, p.decays, weight, end, dk, leaving, cu_seqlens,
        s.tokens, s.T, scale, segments, p.segment_chunks, p.weight_stride,
        BK=launch.tile, BV=p.dv, STARTED=end is not None, LEARNED=learned,
        **p.scan, **p.rule_flags, STAGES=launch.stages if rule.erase else None,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    per_token = (*q.shape[:2], s.HV)
    dlog_decay = None
    if learned:
        dlog_decay, BH = p.empty(*per_token), min(16, power_of_two(s.HV))
        at_start = None if initial is None else (initial * first).sum((2, 3))
        decay_gradient_kernel[(blocks, ceil_div(s.HV, BH))](
            within, entering, leaving, carried, at_start, dlog_decay, cu_seqlens, s.N, s.T, s.tokens,
            HV=s.HV, TILES=tiles, KINDS=kinds, BH=BH, C=config.chunk, EVERY=config.every, STARTED=initial is not None,
            LOOK_BEFORE=rule.look_before, READ_BEFORE=rule.read_before, PACKED=p.packed, num_warps=4,
        )  # fmt: skip
    if dweight is not None:
        dweight = dweight.sum(0).view(per_token)
    dq, dk = (x.view(q.shape) if group == 1 else x.view(*q.shape[:3], group, s.dk).sum(3) for x in (dq, dk))
    return dq, dk, dv, dlog_decay, dweight, first if initial is not None else None
