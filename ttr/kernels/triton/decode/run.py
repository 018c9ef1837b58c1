"""The launches of one decoding step: of one pair with a number a head, and of all else."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from ..launch import Bound
from ..shapes import power_of_two
from .events import events_kernel
from .step import step_kernel


@cache
def launch_of(memories: int, dk: int, dv: int) -> tuple[int, int]:
    """(value columns of a program, warps): narrow tiles where batch x heads is small, so that every SM has loads in flight.

    One warp keeps both sums over the keys out of shared memory, and 64 numbers a thread leave room for sixteen warps.
    """
    rows = power_of_two(dk)
    columns = 8 if memories * -(-dv // 16) < 1024 else 16
    columns = max(4, min(columns, 2048 // rows, power_of_two(dv)))
    return columns, max(1, rows * columns // 2048)


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor | None, log_decay: Tensor | None, state: Tensor,
    step_number: float, log_decay_number: float, gain: float, eps: float, scale: float,
    erase: bool, look_before: bool, read_before: bool, rule: str, launch: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """o of one token; `state` is updated. launch: (columns, warps) other than the committed ones."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    batch, heads = zip(q.stride()[:2], k.stride()[:2], v.stride()[:2], _strides(step), _strides(log_decay), strict=True)
    if state.shape[0] == 1:
        batch = (0,) * 5
    aligned = (batch[0] | batch[1] | batch[2]) % 16 == 0
    flags = aligned, erase, step is not None, log_decay is not None, rule, look_before, read_before
    types = (state.get_device(), *[x if x is None else x.dtype for x in (q, k, v, step, log_decay, state)])
    bound = _bound(types, state.shape, q.shape[1], heads, flags, launch)
    arguments = q, k, v, step, log_decay, state, o, step_number, log_decay_number, gain, eps, scale, *batch
    if (q.data_ptr() | k.data_ptr() | v.data_ptr() | state.data_ptr()) % 16:  # views of something wider
        bound.through_triton(*arguments)
    else:
        bound(*arguments)
    return o


@lru_cache(maxsize=1024)
def _bound(types: tuple, shape: torch.Size, H: int, heads: tuple[int, ...], flags: tuple, launch: tuple[int, int] | None) -> Bound:
    """types: of a device and dtypes, for each of which a bound kernel is another one."""
    B, HV, dk, dv = shape
    columns, warps = launch_of(B * HV, dk, dv) if launch is None else launch
    return step_kernel.bind(
        (B * HV * -(-dv // columns),), warps, ALIGNED=flags[0], **dict(zip(STRIDES, heads, strict=True)), HV=HV, GROUP=HV // H,
        DK=dk, DV=dv, BK=power_of_two(dk), BV=columns, **dict(zip(FLAGS, flags[1:], strict=True)),
    )  # fmt: skip


STRIDES = ("q_h", "k_h", "v_h", "step_h", "decay_h")
FLAGS = ("ERASE", "STEPS", "DECAYS", "RULE", "LOOK_BEFORE", "READ_BEFORE")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(numbers: Tensor | None) -> tuple[int, int] | tuple[int, ...]:
    """Of a signal over [batch, heads]; one of the heads alone, or of one number, has none over the rest."""
    if numbers is None:
        return 0, 0
    return (0,) * (2 - numbers.ndim) + numbers.stride()


def events_in_place(
    q: Tensor, k: Tensor, v: Tensor, write_key: Tensor | None, step: Tensor | None, log_decay: Tensor | None, state: Tensor,
    step_number: float, log_decay_number: float, gain: float, written: float, eps: float, scale: float,
    erase: bool, look_before: bool, read_before: bool, rule: str, per: str, decay_per: str,
) -> Tensor:  # fmt: skip
    """o of one token; `state` is updated. per, decay_per: what step and log_decay are per: number, head, key or value."""
    (B, HV, dk, dv), pairs, H = state.shape, k.shape[1], q.shape[1]
    q, k, v = _rows(q), _rows(k), _rows(v)
    p = None if write_key is None else _rows(write_key)
    step = step if step is None or per == "head" else _rows(step)
    log_decay = log_decay if log_decay is None or decay_per == "head" else _rows(log_decay)
    o = torch.empty(B, HV, dv, dtype=v.dtype, device=v.device)
    none = (0, 0, 0)
    (q_b, q_h), (decay_b, decay_h) = q.stride()[:2], none[:2] if log_decay is None else log_decay.stride()[:2]
    (k_b, k_n, k_h), (v_b, v_n, v_h), (p_b, p_n, p_h), (step_b, step_n, step_h) = (
        none if x is None else x.stride()[:3] for x in (k, v, p, step)
    )
    columns, warps = launch_of(B * HV, dk, dv)
    bound = _bound_events(
        (state.get_device(), *[x if x is None else x.dtype for x in (q, k, v, p, step, log_decay)]), B, columns, warps,
        q_h=q_h, k_h=k_h, v_h=v_h, p_h=p_h, step_h=step_h, decay_h=decay_h, HV=HV, GROUP=HV // H, DK=dk, DV=dv,
        BK=power_of_two(dk), BV=columns, PAIRS=pairs, ERASE=erase, STEP=per, DECAY=decay_per, RULE=rule,
        LOOK_BEFORE=look_before, READ_BEFORE=read_before,
    )  # fmt: skip
    numbers = step_number, log_decay_number, gain, written, eps, scale
    strides = q_b, k_b, k_n, v_b, v_n, p_b, p_n, step_b, step_n, decay_b
    arguments = q, k, v, p, step, log_decay, state, o, *numbers, *strides
    if any(x is not None and x.data_ptr() % 16 for x in (q, k, v, p, step, log_decay, state)):  # views of something wider
        bound.through_triton(*arguments)
    else:
        bound(*arguments)
    return o


@lru_cache(maxsize=1024)
def _bound_events(types: tuple, B: int, columns: int, warps: int, **constants) -> Bound:
    return events_kernel.bind((B * constants["HV"] * -(-constants["DV"] // columns),), warps, **constants)
