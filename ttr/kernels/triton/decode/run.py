"""The launch of one decoding step."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .step import step_kernel


@cache
def launch_of(memories: int, dk: int, dv: int) -> tuple[int, int]:
    """(value columns of a program, warps): narrow tiles where batch x heads is small, so that every SM has loads in flight.

    One warp keeps both sums over the keys out of shared memory, and 64 numbers a thread leave room for sixteen warps.
    """
    rows = _power_of_2(dk)
    columns = 8 if memories * -(-dv // 16) < 1024 else 16
    columns = max(4, min(columns, 2048 // rows, _power_of_2(dv)))
    return columns, max(1, rows * columns // 2048)


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor | None, log_decay: Tensor | None, state: Tensor,
    step_number: float, log_decay_number: float, gain: float, eps: float, scale: float,
    erase: bool, look_before: bool, read_before: bool, rule: str, launch: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """o of one token; `state` is updated. launch: (columns, warps) other than the committed ones."""
    B, HV, dk, dv = state.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    (q_b, q_h, _), (k_b, k_h, _), (v_b, v_h, _) = q.stride(), k.stride(), v.stride()
    (step_b, step_h), (decay_b, decay_h) = _strides(step), _strides(log_decay)
    o = torch.empty((B, HV, dv), dtype=v.dtype, device=v.device)
    columns, warps = launch_of(B * HV, dk, dv) if launch is None else launch
    step_kernel[(B * HV * -(-dv // columns),)](
        q, k, v, step, log_decay, state, o, step_number, log_decay_number, gain, eps, scale,
        q_b, q_h, k_b, k_h, v_b, v_h, step_b, step_h, decay_b, decay_h,
        HV=HV, GROUP=HV // q.shape[1], DK=dk, DV=dv, BK=_power_of_2(dk), BV=columns,
        ERASE=erase, STEPS=step is not None, DECAYS=log_decay is not None, RULE=rule,
        LOOK_BEFORE=look_before, READ_BEFORE=read_before, num_warps=warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return o


def _power_of_2(n: int) -> int:
    """The least one >= n; triton's own costs microseconds a call."""
    return 1 << (n - 1).bit_length()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(numbers: Tensor | None) -> tuple[int, int] | tuple[int, ...]:
    """Of a signal over [batch, heads]; one of the heads alone, or of one number, has none over the rest."""
    if numbers is None:
        return 0, 0
    return (0,) * (2 - numbers.ndim) + numbers.stride()
