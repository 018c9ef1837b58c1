"""What the oracles' own tests share: the sizes, the comparison, special keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

B, T, H, DK, DV = 2, 11, 3, 5, 4


def same(left: Tensor, right: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to `tolerance` of the right side's largest entry."""
    assert left.shape == right.shape
    assert torch.isfinite(left).all()
    error = (left - right).abs().max() / right.abs().max().clamp(min=1e-300)
    assert error < tolerance, f"relative error {error:.1e}"


def both(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    """Outputs and states are equal."""
    same(left[0], right[0])
    same(left[1], right[1])


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1."""
    return F.normalize(x, dim=-1)


def per_key(signal: Tensor) -> Tensor:
    """A per-head signal, the same for every key channel."""
    return signal[..., None].expand(*signal.shape, DK)


def one_hot_keys(length: int) -> Tensor:
    """Orthonormal keys, never repeated: [B, length, H, length]."""
    return torch.eye(length, dtype=torch.float64)[None, :, None].expand(B, length, H, length)
