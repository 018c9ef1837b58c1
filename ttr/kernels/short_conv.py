"""`short_conv`: a stream filtered over the last few tokens. On a GPU one kernel each way, tokens as they lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .eager import launches
from .triton.eligible import DTYPES


def short_conv(
    x: Tensor, weight: Tensor, history: Tensor | None, formula: Callable[[Tensor, Tensor], Tensor],
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """y_t = sum_j weight[:, -1 - j] x_(t - j), in float32 at least, in x's dtype.

    x: [B, T, D]; weight: [D, K]; history: [N, K - 1, D], what came before x, or None for zeros. places: of a packed row
    [1, T, D], the sequence of each token and its place in it. formula: (x, weight) -> y in torch's own operations.
    """
    if launches(x) and weight.dtype in DTYPES and (history is None or history.dtype in DTYPES) and not _learned(history):
        from .triton.short_conv.function import ShortConv

        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype  # as a convolution does
        return ShortConv.apply(x.to(dtype), weight, history, *(places or (None, None)), formula)
    return formula(x, weight)


def _learned(history: Tensor | None) -> bool:
    """Whether a gradient goes back to what came before: the formula's."""
    return history is not None and history.requires_grad and torch.is_grad_enabled()
