"""The ends of packed sequences as the kernels take them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_packed, packed_lengths

_checked: tuple[Any, int, int] | None = None  # the last cu_seqlens that was looked at, its version, T


def packed(cu_seqlens: Tensor, B: int, T: int, device: torch.device) -> Tensor:
    """int32 on the device. On CUDA nobody waits for its values: a wrong one is a device-side assertion.

    The layers of a model pass one and the same tensor: it is looked at once.
    """
    global _checked
    check_packed(cu_seqlens, B)
    out = cu_seqlens.to(device, torch.int32)
    if torch.compiler.is_compiling():
        _assert_packed(out, T)
    elif device.type == "cpu":
        packed_lengths(cu_seqlens, B, T)
    else:
        version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
        if version < 0 or _checked is None or _checked[0]() is not cu_seqlens or _checked[1:] != (version, T):
            _assert_packed(out, T)
            _checked = weakref.ref(cu_seqlens), version, T
    return out.contiguous()


def _assert_packed(cu_seqlens: Tensor, T: int) -> None:
    zero = cu_seqlens.new_zeros(1)
    gaps = torch.diff(cu_seqlens, prepend=zero, append=zero + T)  # what lies before, the sequences, what lies behind
    torch._assert_async(  # type: ignore[attr-defined]
        (gaps >= 0).all() & (gaps[0] + gaps[-1] == 0), "cu_seqlens: expected 0 = c_0 <= c_1 <= ... <= c_N = T"
    )
