"""Least squares over all pairs so far: recursively by Sherman and Morrison, or by solving the normal equations."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import apply, inner, outer, scalar, start


def rls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: Tensor,
    weight: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Recursive least squares with forgetting (Haykin, Adaptive Filter Theory); P_0 = Diag(1/λ), ridge λ [H, dk].

    P⁻ = P_{t-1}/γ_t,   g_t = β_t P⁻ k_t / (1 + β_t k_tᵀ P⁻ k_t)
    S_t = S_{t-1} + (v_t − S_{t-1} k_t) g_tᵀ,   P_t = P⁻ − g_t k_tᵀ P⁻,   o_t = S_t q_t.

    So S_t = G_t (H_t + Diag(λ) Πγ)^{-1}: the ridge decays along with the statistics.
    """
    weight = torch.ones_like(q[..., 0]) if weight is None else weight
    log_decay = torch.zeros_like(q[..., 0]) if log_decay is None else log_decay
    S, outputs = start(q, v, None), []
    P = torch.diag_embed(1 / ridge).expand(q.shape[0], -1, -1, -1)
    for t in range(q.shape[1]):
        before = P / scalar(log_decay[:, t].exp())
        direction = apply(before, k[:, t])
        gain = weight[:, t, :, None] * direction / (1 + weight[:, t] * inner(k[:, t], direction))[..., None]
        S = S + outer(v[:, t] - apply(S, k[:, t]), gain)
        P = before - outer(gain, direction)
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), {"W": S.transpose(-1, -2), "P": P}


def mesa(q: Tensor, k: Tensor, v: Tensor, *, ridge: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The Mesa layer, von Oswald et al. 2023 (2309.05858): ridge regression on all pairs, by Sherman and Morrison.

    R_t = R_{t-1} − R_{t-1} k_t k_tᵀ R_{t-1} / (1 + k_tᵀ R_{t-1} k_t),   R_0 = Diag(1/ridge)
    Φ_t = (Σ_{i≤t} v_i k_iᵀ) R_t,   o_t = Φ_t q_t.

    The paper's R_0 is λ I, so its λ is 1/ridge; ridge [H, dk]. The state is G = Σ k vᵀ and R.
    """
    G, outputs = start(q, v, None), []
    R = torch.diag_embed(1 / ridge).expand(q.shape[0], -1, -1, -1)
    for t in range(q.shape[1]):
        direction = apply(R, k[:, t])
        R = R - outer(direction, direction) / scalar(1 + inner(k[:, t], direction))
        G = G + outer(v[:, t], k[:, t])
        outputs.append(scale * apply(G @ R, q[:, t]))
    return torch.stack(outputs, 1), {"G": G.transpose(-1, -2), "R": R}


def mesanet(
    q: Tensor, k: Tensor, v: Tensor, *, weight: Tensor, log_decay: Tensor, ridge: Tensor, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """MesaNet, von Oswald et al. 2025 (2506.05233), eq. (5), solved directly where the paper runs conjugate gradients.

    G_t = γ_t G_{t-1} + β_t v_t k_tᵀ,   H_t = γ_t H_{t-1} + β_t k_t k_tᵀ,   o_t = G_t (H_t + Λ)^{-1} q_t.

    weight is β, log_decay log γ, both [B, T, H]; Λ = Diag(ridge) [H, dk] is constant in time. The state is G and H.
    """
    G, outputs = start(q, v, None), []
    H = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], q.shape[3])
    for t in range(q.shape[1]):
        keep, write = scalar(log_decay[:, t].exp()), scalar(weight[:, t])
        G = keep * G + write * outer(v[:, t], k[:, t])
        H = keep * H + write * outer(k[:, t], k[:, t])
        solution = torch.linalg.solve(H + torch.diag_embed(ridge), scale * q[:, t])
        outputs.append(apply(G, solution))
    return torch.stack(outputs, 1), {"G": G.transpose(-1, -2), "H": H}
