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
