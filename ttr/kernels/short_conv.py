"""`short_conv`: a stream filtered over the last few tokens. On a GPU one kernel forward, with SiLU too, tokens as they lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import launches
from .triton.eligible import DTYPES

MOST = 2**31 - 4096  # tokens: the kernel counts them in 32 bits, up to a program's and a filter's more


def short_conv(
    x: Tensor, weight: Tensor, history: Tensor | None, formula: Callable[[Tensor, Tensor], Tensor],
    places: tuple[Tensor, Tensor] | None = None, silu: bool = False,
) -> Tensor:  # fmt: skip
    """y_t = sum_j weight[:, -1 - j] x_(t - j), in x's dtype, or in autocast's; silu: z sigmoid(z) of that sum z.

    x: [B, T, D]; weight: [D, K]; history: [N, K - 1, D], what came before x, or None for zeros. places: of a packed row
    [1, T, D], the sequence of each token and its place in it. formula: (x, weight) -> y in torch's own operations.
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in DTYPES and weight.device == x.device
    if plain and launches(x) and _runs(x, weight, history):
        from .triton.short_conv.function import ShortConv

        history = None if history is None else history.to(x.dtype)
        return ShortConv.apply(x, weight.to(x.dtype), history, *(places or (None, None)), formula, silu)
    y = formula(x, weight)
    return F.silu(y) if silu else y


def _runs(x: Tensor, weight: Tensor, history: Tensor | None) -> bool:
    """Whether the kernel counts so many tokens and takes such a history; a gradient that goes back to it is the formula's, as is the
    error if it does not fit."""
    if x.shape[0] * x.shape[1] > MOST:
        return False
    if history is None:
        return True
    fits = history.shape[1:] == (weight.shape[1] - 1, weight.shape[0]) and history.device == x.device
    return fits and not (history.requires_grad and torch.is_grad_enabled())
