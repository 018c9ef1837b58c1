"""Softmax attention, the non-parametric regressor: a kernel average over the stored pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import scale_or_default


def softmax(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal softmax attention, Vaswani et al. 2017 (1706.03762), eq. (1), with i ≤ t:

    o_t = Σ_{i≤t} a_ti v_i,   a_t = softmax_i(scale · q_tᵀ k_i),   scale = dk^-½.

    The state is the cache, in the layout of k and v.
    """
    return softmax_window(q, k, v, window=q.shape[1], scale=scale)


def softmax_window(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Sliding-window attention, Beltagy et al. 2020 (2004.05150), causal: as `softmax` with i > t − window.

    Token t sees itself and the window − 1 tokens before it; the state is the cache of the last `window` pairs.
    """
    scale = scale_or_default(scale, q)
    outputs = []
    for t in range(q.shape[1]):
        first = max(0, t - window + 1)
        scores = torch.stack([(q[:, t] * k[:, i]).sum(-1) * scale for i in range(first, t + 1)])  # [i, B, H]
        weights = (scores - scores.max(0).values).exp()
        weights = weights / weights.sum(0)
        outputs.append(sum(weights[i - first][..., None] * v[:, i] for i in range(first, t + 1)))
    return torch.stack(outputs, 1), {"k": k[:, -window:], "v": v[:, -window:]}
