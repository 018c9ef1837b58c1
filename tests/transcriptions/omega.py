"""The Omega rule: every token descends on a window of pairs; gradients worked out by hand.

Behrouz et al. 2025 (2505.23735), from secondary transcripts of the paper. As in nonlinear.py: [H, d_in, d_out], rows; q and
k are the features of the paper's queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .algebra import scalar
from .nonlinear import Memory


def omeganet(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, log_decay: Tensor, gamma: Tensor, weights: Sequence[Tensor], mini_batch: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """OmegaNet: W_t = α_t W_{t-1} − η_t Σ_{i=t−c+1}^{t} γ_i^{(t)} ∇½‖M(k_i; W_{t'}) − v_i‖², M(x) = GELU(x W1) W2.

    gamma: [B, T, H, c], of the pairs t, t−1, …, t−c+1; t' the token before the mini-batch of t.
    """
    current = [W.expand(q.shape[0], *W.shape) for W in weights]

    def move(t: int, current: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return [scalar(log_decay[:, t].exp()) * W - scalar(step[:, t]) * g for W, g in zip(current, gradients, strict=True)]

    return _windowed(q, k, v, gamma, current, mini_batch, move)


def atlas(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, momentum: Tensor, log_decay: Tensor, gamma: Tensor, weights: Sequence[Tensor],
    mini_batch: int = 1, eps: float = 1e-7,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Atlas: N_t = θ_t N_{t-1} + Σ_{i=t−c+1}^{t} γ_i^{(t)} ∇½‖M(k_i; W_{t'}) − v_i‖²,  W_t = α_t W_{t-1} − η_t NS5(N_t).

    M, gamma and t' as in `omeganet`; NS5 on every token's N. The state has N as momentum_W1 and so on.
    """
    current = [W.expand(q.shape[0], *W.shape) for W in weights]
    N = [torch.zeros_like(W) for W in current]

    def move(t: int, current: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        N[:] = [scalar(momentum[:, t]) * n + g for n, g in zip(N, gradients, strict=True)]
        return [scalar(log_decay[:, t].exp()) * W - scalar(step[:, t]) * newton_schulz(n, eps) for W, n in zip(current, N, strict=True)]

    o, state = _windowed(q, k, v, gamma, current, mini_batch, move)
    return o, state | {f"momentum_W{depth + 1}": n for depth, n in enumerate(N)}


def newton_schulz(N: Tensor, eps: float) -> Tensor:
    """Muon's, on the right for tall matrices: X ← X (a + b C + c C²), C = XᵀX, five times from N / (‖N‖_F + eps)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = N / (N.square().sum((-2, -1), keepdim=True).sqrt() + eps)
    for _ in range(5):
        if X.shape[-2] > X.shape[-1]:
            C = X.mT @ X
            X = X @ (a * torch.eye(C.shape[-1], dtype=C.dtype) + b * C + c * C @ C)
        else:
            C = X @ X.mT
            X = (a * torch.eye(C.shape[-1], dtype=C.dtype) + b * C + c * C @ C) @ X
    return X


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, current: list[Tensor], mini_batch: int,
    move: Callable[[int, list[Tensor], list[Tensor]], list[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    memory, no_biases = Memory(None, None, False, "erf"), [None] * len(current)
    frozen, outputs = current, []
    for t in range(q.shape[1]):
        if t % mini_batch == 0:
            frozen = current
        total = [torch.zeros_like(W) for W in current]
        for lag in range(min(gamma.shape[-1], t + 1)):
            gradients, _ = memory.gradients(frozen, no_biases, k[:, t - lag], v[:, t - lag])
            total = [T + scalar(gamma[:, t, :, lag]) * g for T, g in zip(total, gradients, strict=True)]
        current = move(t, current, total)
        outputs.append(memory.predict(current, no_biases, q[:, t]))
    return torch.stack(outputs, 1), {f"W{depth + 1}": W for depth, W in enumerate(current)}
