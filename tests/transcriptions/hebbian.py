"""Hebbian recurrences: every token adds v kᵀ, nothing is corrected; what differs is how the sum forgets."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import apply, columns, inner, outer, scalar, scale_or_default, start


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 0.0, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Linear attention, Katharopoulos et al. 2020 (2006.16236), eqs. (16) to (20); q and k are features φ already.

    S_t = S_{t-1} + v_t φ(k_t)ᵀ,   z_t = z_{t-1} + φ(k_t),   o_t = S_t φ(q_t) / (z_tᵀ φ(q_t) + ε).

    The state is S and z. ε is not in the paper and 1e-6 in its code; without it the scale cancels.
    """
    S, z, outputs = start(q, v, None), torch.zeros_like(k[:, 0]), []
    for t in range(q.shape[1]):
        S = S + outer(v[:, t], k[:, t])
        z = z + k[:, t]
        query = scale * q[:, t]
        outputs.append(apply(S, query) / (inner(z, query) + eps)[..., None])
    return torch.stack(outputs, 1), {"W": S.transpose(-1, -2), "normaliser": z}


def linear_attention_unnormalised(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Linear attention without its denominator, Schlag et al. 2021 (2102.11174), the additive fast-weight programmer.

    S_t = S_{t-1} + v_t φ(k_t)ᵀ,   o_t = S_t φ(q_t).
    """
    return _decayed(q, k, v, v.new_ones(v.shape[:3]), scale, state)


def retnet(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Retention, Sun et al. 2023 (2307.08621), recurrent form, eq. (6), decays of eq. (8); q, k rotated already.

    S_t = γ_h S_{t-1} + v_t k_tᵀ,   o_t = S_t q_t,   γ_h = 1 − 2^(−5−h).
    """
    gamma = torch.tensor([1 - 2.0 ** (-5 - head) for head in range(q.shape[2])], dtype=q.dtype)
    return _decayed(q, k, v, gamma.expand(v.shape[:3]), scale, state)


def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int = 0,
    n_layers: int = 1,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lightning attention, Qin et al. 2024 (2405.17381): the recurrence S_t = λ S_{t-1} + v_t k_tᵀ, o_t = S_t q_t.

    λ_{h,ℓ} = exp(−(8h/H)(1 − ℓ/L)), heads h and layers ℓ counted from 0, so that head 0 never forgets. The norm after
    the layer absorbs the query scale, for which dk^-½ is taken.
    """
    n_heads = q.shape[2]
    rates = [(8 * head / n_heads) * (1 - layer / n_layers) for head in range(n_heads)]
    decay = torch.tensor(rates, dtype=q.dtype).neg().exp()
    return _decayed(q, k, v, decay.expand(v.shape[:3]), scale, state)


def gla(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated linear attention, Yang et al. 2023 (2312.06635), recurrent form of its section 4; log_decay [B, T, H, dk].

    S_t = S_{t-1} Diag(α_t) + v_t k_tᵀ,   o_t = S_t q_t dk^-½,   α_t = exp(log_decay_t).
    """
    scale = scale_or_default(scale, q)
    S, outputs = start(q, v, state), []
    for t in range(q.shape[1]):
        S = columns(S, log_decay[:, t].exp()) + outer(v[:, t], k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)


def mamba2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    log_decay: Tensor,
    scale: float = 1.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The SSD core of Mamba-2, Dao and Gu 2024 (2405.21060): q = C, k = B, v = x, step = Δ, log_decay = −Δ e^A.

    S_t = exp(−Δ_t e^A) S_{t-1} + (Δ_t x_t) B_tᵀ,   y_t = S_t C_t.
    """
    return _decayed(q, k, step[..., None] * v, log_decay.exp(), scale, state)


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, *, log_input: Tensor, log_forget: Tensor, scale: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mLSTM cell, Beck et al. 2024 (2405.04517), eqs. (19) to (27), in stabilised form; k is multiplied by dk^-½.

    m_t = max(log f_t + m_{t-1}, log i_t),   f' = exp(log f_t + m_{t-1} − m_t),   i' = exp(log i_t − m_t)
    S_t = f' S_{t-1} + i' v_t k_tᵀ,   n_t = f' n_{t-1} + i' k_t,   o_t = S_t q_t / max(|n_tᵀ q_t|, e^{−m_t}).

    The state is S and n in their stabilised scale, and m; times e^m they are the plain sums. As the first token has
    nothing to keep, its m is its own log i.
    """
    scale = scale_or_default(scale, q)
    S, n = start(q, v, None), torch.zeros_like(k[:, 0])
    m = torch.full_like(log_input[:, 0], -torch.inf)
    outputs = []
    for t in range(q.shape[1]):
        key = scale * k[:, t]
        carried = log_forget[:, t] + m
        m = torch.maximum(carried, log_input[:, t])
        keep, write = (carried - m).exp(), (log_input[:, t] - m).exp()
        S = scalar(keep) * S + scalar(write) * outer(v[:, t], key)
        n = keep[..., None] * n + write[..., None] * key
        outputs.append(apply(S, q[:, t]) / torch.maximum(inner(n, q[:, t]).abs(), (-m).exp())[..., None])
    return torch.stack(outputs, 1), {"W": S.transpose(-1, -2), "normaliser": n, "m": m}


def _decayed(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + v_t k_tᵀ, o_t = scale · S_t q_t, with one number a_t per head: decay [B, T, H]."""
    scale = scale_or_default(scale, q)
    S, outputs = start(q, v, state), []
    for t in range(q.shape[1]):
        S = scalar(decay[:, t]) * S + outer(v[:, t], k[:, t])
        outputs.append(scale * apply(S, q[:, t]))
    return torch.stack(outputs, 1), S.transpose(-1, -2)
