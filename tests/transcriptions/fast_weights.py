"""LaCT's fast weights: a SwiGLU network stepped on once per large chunk, gradients worked out by hand.

As in the paper, weights are [d_out, d_in] and act on columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import outer, scalar

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalised(G: Tensor) -> Tensor:
    """Five iterations X ← a X + (b A + c A²) X, A = X Xᵀ, from G / (‖G‖ + 1e-7)."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def hidden(W_0: Tensor, W_2: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's pre-activation W_0 x and what it gates, W_2 x: [B, H, h] each."""
    return torch.einsum("bhij,bhj->bhi", W_0, x), torch.einsum("bhij,bhj->bhi", W_2, x)


def ascent(weights: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ⟨f(k), v⟩, f(x) = W_1 (SiLU(W_0 x) ⊙ W_2 x), with respect to W_0, W_1, W_2."""
    W_0, W_1, W_2 = weights
    g, u = hidden(W_0, W_2, k)
    s = torch.sigmoid(g)
    silu, slope = g * s, s * (1 + g * (1 - s))
    d = torch.einsum("bhij,bhi->bhj", W_1, v)
    return outer(d * u * slope, k), outer(v, silu * u), outer(d * silu, k)


def lact(
    q: Tensor, k: Tensor, v: Tensor, *, rates: Tensor, momentum: Tensor, W_0: Tensor, W_1: Tensor, W_2: Tensor, chunk: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The fast-weight half of LaCT, Zhang et al. 2025 (2505.23884), with momentum, Muon and post-norm.

    Δ = Σ_i lr_i ∇⟨f(k_i), v_i⟩ over the chunk,   M ← Δ + m̄ M,   W ← ‖W_init‖ (W + NS5(M)) / ‖W + NS5(M)‖ row by row,

    lr_i a rate for every matrix (rates: [B, T, H, 3], of W_0, W_1, W_2), m̄ the chunk's mean of momentum [B, T, H]. Queries
    read the weights before their chunk's step; a last, open chunk makes none. The state is the weights and, as momentum_W_0
    and so on, M.
    """
    initial = tuple(W.expand(q.shape[0], *W.shape) for W in (W_0, W_1, W_2))
    lengths = [W.square().sum(-1, keepdim=True).sqrt() for W in initial]
    weights, M = initial, [torch.zeros_like(W) for W in initial]
    outputs = []
    for start in range(0, q.shape[1], chunk):
        tokens = range(start, min(start + chunk, q.shape[1]))
        for t in tokens:
            g, u = hidden(weights[0], weights[2], q[:, t])
            outputs.append(torch.einsum("bhij,bhj->bhi", weights[1], g * torch.sigmoid(g) * u))
        if len(tokens) < chunk:
            break
        total = [torch.zeros_like(W) for W in weights]
        for t in tokens:
            slopes = ascent(weights, k[:, t], v[:, t])
            total = [D + scalar(rates[:, t, :, i]) * s for i, (D, s) in enumerate(zip(total, slopes, strict=True))]
        kept = scalar(momentum[:, start : start + chunk].mean(1))
        M = [D + kept * m for D, m in zip(total, M, strict=True)]
        moved = [W + orthogonalised(m) for W, m in zip(weights, M, strict=True)]
        weights = tuple(n * W / W.square().sum(-1, keepdim=True).sqrt() for n, W in zip(lengths, moved, strict=True))
    state = {f"W_{i}": W for i, W in enumerate(weights)} | {f"momentum_W_{i}": m for i, m in enumerate(M)}
    return torch.stack(outputs, 1), state
