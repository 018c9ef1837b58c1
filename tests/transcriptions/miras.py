"""The three layers of MIRAS: gradients worked out by hand, weights of their own for every token.

Behrouz et al. 2025 (2504.13173), from secondary transcripts of the paper. As in nonlinear.py: [H, d_in, d_out], rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .algebra import scalar
from .nonlinear import Memory

Weights = list[Tensor]


def yaad(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, threshold: Tensor, log_decay: Tensor, weights: Sequence[Tensor],
    norm_weight: Tensor, norm_bias: Tensor, mini_batch: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Yaad, its third form of the Huber loss: W_t = α_t W_{t-1} − η_t ∇½‖e‖² if ‖e‖ ≤ δ_t else α_t W_{t-1} − η_t δ_t ∇‖e‖₁.

    e = M(k_t; W_{t'}) − v_t, t' the token before the mini-batch of t; log_decay is log α. The paper's ℓ₂ has no ½.
    """

    def slope(t: int, e: Tensor) -> Tensor:
        delta = threshold[:, t, :, None]
        return torch.where(e.norm(dim=-1, keepdim=True) <= delta, e, delta * e.sign())

    def retain(t: int, W: Tensor, gradient: Tensor) -> Tensor:
        return scalar(log_decay[:, t].exp()) * W - scalar(step[:, t]) * gradient

    return _layer(q, k, v, weights, Memory(norm_weight, norm_bias, True, "erf"), mini_batch, slope, retain)


def moneta(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, log_decay: Tensor, weights: Sequence[Tensor], norm_weight: Tensor,
    norm_bias: Tensor, mini_batch: int = 1, p: float = 3, exponent: float = 4, sharpness: float = 10, eps: float = 1e-6,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Moneta: A_t = α_t A_{t-1} − η_t ∇ℓ_p(W_{t'}),   W_t = A_t / ‖A_t‖_q^{q−2},   ∇ℓ_p through p Sign(e) ⊙ |e|^{p−1},

    Sign(x) = tanh(a x), |x| = √(x² + ε). The weights given and returned are A; exponent is q.
    """

    def slope(t: int, e: Tensor) -> Tensor:
        return p * torch.tanh(sharpness * e) * torch.sqrt(e**2 + eps) ** (p - 1)

    def retain(t: int, A: Tensor, gradient: Tensor) -> Tensor:
        return scalar(log_decay[:, t].exp()) * A - scalar(step[:, t]) * gradient

    def used(A: Tensor) -> Tensor:
        norm = (A.abs() ** exponent).sum((-2, -1), keepdim=True) ** (1 / exponent)
        return A / norm ** (exponent - 2)

    return _layer(q, k, v, weights, Memory(norm_weight, norm_bias, True, "erf"), mini_batch, slope, retain, used)


def memora(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, log_decay: Tensor, weights: Sequence[Tensor], norm_weight: Tensor,
    norm_bias: Tensor, mini_batch: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Memora: W_t = softmax(α_t log W_{t-1} − η_t ∇½‖e‖²), normalised over what a unit takes in.

    weights: positive, each unit's summing to 1. The paper's ℓ₂ has no ½.
    """

    def retain(t: int, W: Tensor, gradient: Tensor) -> Tensor:
        powered = W ** scalar(log_decay[:, t].exp()) * torch.exp(-scalar(step[:, t]) * gradient)
        return powered / powered.sum(-2, keepdim=True)

    return _layer(q, k, v, weights, Memory(norm_weight, norm_bias, True, "erf"), mini_batch, lambda t, e: e, retain)


def _layer(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], memory: Memory, mini_batch: int,
    slope: Callable[[int, Tensor], Tensor], retain: Callable[[int, Tensor, Tensor], Tensor], used: Callable[[Tensor], Tensor] = lambda A: A,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """What the three share. slope: the loss's derivative in the error; retain: the next weights; used: those that predict."""
    no_biases = [None] * len(weights)
    current = [W.expand(q.shape[0], *W.shape) for W in weights]
    frozen, outputs = current, []
    for t in range(q.shape[1]):
        if t % mini_batch == 0:
            frozen = [used(W) for W in current]
        gradients, _ = memory.gradients(frozen, no_biases, k[:, t], v[:, t], lambda e, t=t: slope(t, e))
        current = [retain(t, W, g) for W, g in zip(current, gradients, strict=True)]
        outputs.append(memory.predict([used(W) for W in current], no_biases, q[:, t]))
    return torch.stack(outputs, 1), {f"W{depth + 1}": W for depth, W in enumerate(current)}
