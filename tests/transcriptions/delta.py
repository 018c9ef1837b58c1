"""Delta-rule recurrences: a token writes what the memory got wrong about its value."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import apply, columns, inner, outer, scalar, scale_or_default, start


def deltanet(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, scale: float | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DeltaNet, Schlag et al. 2021 (2102.11174) and Yang et al. 2024 (2406.06484), the delta rule:

    S_t = S_{t-1} − β_t (S_{t-1} k_t − v_t) k_tᵀ,   o_t = S_t q_t dk^-½.
    """
    scale = scale_or_default(scale, q)
    S, outputs = start(q, v, state), []
    for t in range(q.shape[1]):
        S = S - scalar(step[:, t]) * outer(apply(S, k[:, t]) - v[:, t], k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def gated_deltanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    log_decay: Tensor,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet, Yang et al. 2024 (2412.06464), eq. (10); the decay comes first, and what is erased is decayed.

    S_t = S_{t-1} α_t (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ,   o_t = S_t q_t dk^-½.
    """
    scale = scale_or_default(scale, q)
    S, identity, outputs = start(q, v, state), torch.eye(q.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        erase = identity - scalar(step[:, t]) * outer(k[:, t], k[:, t])
        S = S @ (scalar(log_decay[:, t].exp()) * erase) + scalar(step[:, t]) * outer(v[:, t], k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    log_decay: Tensor,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention, Kimi Team 2025 (2510.26692), eq. (1); log_decay [B, T, H, dk].

    S_t = S_{t-1} Diag(α_t) (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ,   o_t = S_t q_t dk^-½.
    """
    scale = scale_or_default(scale, q)
    S, identity, outputs = start(q, v, state), torch.eye(q.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        erase = identity - scalar(step[:, t]) * outer(k[:, t], k[:, t])
        S = columns(S, log_decay[:, t].exp()) @ erase + scalar(step[:, t]) * outer(v[:, t], k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def rwkv7(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    write_key: Tensor,
    step: Tensor,
    log_decay: Tensor,
    scale: float = 1.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7, Peng et al. 2025 (2503.14456), its recurrence; q = r, k = κ̂, write_key = k̃, step = a, log_decay = log w.

    S_t = S_{t-1} (Diag(w_t) − κ̂_t (a_t ⊙ κ̂_t)ᵀ) + v_t k̃_tᵀ,   o_t = S_t r_t.

    a and w vary per key channel, [B, T, H, dk]. The decay is coupled: the erased read is of the undecayed memory.
    """
    S, outputs = start(q, v, state), []
    for t in range(q.shape[1]):
        transition = torch.diag_embed(log_decay[:, t].exp()) - outer(k[:, t], step[:, t] * k[:, t])
        S = S @ transition + outer(v[:, t], write_key[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: Tensor,
    right: Tensor,
    log_decay: Tensor,
    scale: float = 1.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The general diagonal-plus-low-rank recurrence that RWKV-7 (2503.14456) and KDA (2510.26692) are instances of:

    S_t = S_{t-1} (Diag(w_t) + a_t b_tᵀ) + v_t k_tᵀ,   o_t = S_t q_t,   a = left, b = right, all [B, T, H, dk].
    """
    S, outputs = start(q, v, state), []
    for t in range(q.shape[1]):
        S = columns(S, log_decay[:, t].exp()) + outer(apply(S, left[:, t]), right[:, t]) + outer(v[:, t], k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def deltaproduct(
    q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, scale: float | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DeltaProduct, Siems et al. 2025 (2502.10297): n delta steps per token; k, v [B, T, n, H, d], step [B, T, n, H].

    For j = 1..n: S ← S − β_{t,j} (S k_{t,j} − v_{t,j}) k_{t,j}ᵀ;   o_t = S q_t dk^-½.
    """
    return gated_deltaproduct(q, k, v, step=step, log_decay=torch.zeros_like(step[:, :, 0]), scale=scale, state=state)


def gated_deltaproduct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    log_decay: Tensor,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaProduct, Siems et al. 2025 (2502.10297): one decay per token, before its n delta steps.

    S ← α_t S once; for j = 1..n: S ← S − β_{t,j} (S k_{t,j} − v_{t,j}) k_{t,j}ᵀ;   o_t = S q_t dk^-½.

    k, v [B, T, n, H, d], step [B, T, n, H], log_decay [B, T, H].
    """
    scale = scale_or_default(scale, q)
    S, outputs = start(q, v[:, :, 0], state), []
    for t in range(q.shape[1]):
        S = scalar(log_decay[:, t].exp()) * S
        for j in range(k.shape[2]):
            error = apply(S, k[:, t, j]) - v[:, t, j]
            S = S - scalar(step[:, t, j]) * outer(error, k[:, t, j])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def longhorn(q: Tensor, k: Tensor, v: Tensor, *, step: Tensor, scale: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Longhorn, Liu et al. 2024 (2407.14207), the exact solution of its online problem, not the diagonal form.

    S_t = argmin_S ‖S − S_{t-1}‖² + ‖S k_t − v_t‖²_{Diag(β_t)}, which is
    S_t = S_{t-1} + Diag(Δ_t) (v_t − S_{t-1} k_t) k_tᵀ,   Δ_{t,i} = β_{t,i} / (1 + β_{t,i} ‖k_t‖²),   o_t = S_t q_t.

    step is β, [B, T, H] or, one rate per value channel, [B, T, H, dv].
    """
    step = step[..., None] if step.dim() == 3 else step
    S, outputs = start(q, v, state), []
    for t in range(q.shape[1]):
        rate = step[:, t] / (1 + step[:, t] * inner(k[:, t], k[:, t])[..., None])
        S = S + outer(rate * (v[:, t] - apply(S, k[:, t])), k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def momentum_deltanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    momentum: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Heavy ball on the delta rule: the linear memory of Titans, Behrouz et al. 2025 (2501.00663), eqs. (13) and (14).

    M_t = η_t M_{t-1} − θ_t (S_{t-1} k_t − v_t) k_tᵀ,   S_t = α_t S_{t-1} + M_t,   o_t = S_t q_t dk^-½.

    The loss is ½‖S k − v‖², so θ is twice the paper's; the decay, where given, is coupled and spares M.
    """
    scale = scale_or_default(scale, q)
    log_decay = torch.zeros_like(step) if log_decay is None else log_decay
    S = start(q, v, None)
    M, outputs = torch.zeros_like(S), []
    for t in range(q.shape[1]):
        gradient = outer(apply(S, k[:, t]) - v[:, t], k[:, t])
        M = scalar(momentum[:, t]) * M - scalar(step[:, t]) * gradient
        S = scalar(log_decay[:, t].exp()) * S + M
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), {"W": S.transpose(-1, -2), "momentum": M.transpose(-1, -2)}
