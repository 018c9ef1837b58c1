"""The product gate by which Titans joins attention and memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class ProductGate(nn.Module):
    """y (x) m = n(y) * silu(n'(m)), n and n' RMS norms with a learned weight each: [B, T, d], [B, T, d] -> [B, T, d].

    The paper says no more than "normalise both by learned vectors, then a non-linearity": with this one a memory that
    holds nothing lets nothing through. Source: Titans (2501.00663), section 4.2.
    """

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=EPS)
        self.memory_norm = nn.RMSNorm(width, eps=EPS)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        wide = self.attention_norm.weight.dtype  # under autocast the norms stay in their weights' precision
        return self.attention_norm(y.to(wide)) * F.silu(self.memory_norm(m.to(wide)))

    def reset_parameters(self) -> None:
        self.attention_norm.reset_parameters()
        self.memory_norm.reset_parameters()
