"""The few vector operations the transcriptions are written in; batch and heads lead every tensor."""

from __future__ import annotations

from torch import Tensor


def outer(left: Tensor, right: Tensor) -> Tensor:
    """left rightᵀ: [..., m], [..., n] -> [..., m, n]."""
    return left[..., :, None] * right[..., None, :]


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix vector: [..., m, n], [..., n] -> [..., m]."""
    return (matrix * vector[..., None, :]).sum(-1)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right: [..., n], [..., n] -> [...]."""
    return (left * right).sum(-1)


def columns(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix Diag(factor): [..., m, n], [..., n] -> [..., m, n]."""
    return matrix * factor[..., None, :]


def scalar(signal: Tensor) -> Tensor:
    """A per-head number, ready to multiply a matrix: [...] -> [..., 1, 1]."""
    return signal[..., None, None]


def scale_or_default(scale: float | None, q: Tensor) -> float:
    """The factor on q: dk^-½ where none is given."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def start(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The paper's S before the first token, [B, H, dv, dk]: zero, or a given state [B, H, dk, dv] transposed."""
    if state is not None:
        return state.transpose(-1, -2)
    return q.new_zeros(q.shape[0], q.shape[2], v.shape[-1], q.shape[-1])
