"""What the identity tests share: sizes, paths, random inputs, comparisons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ttr

B, T, H, DK, DV = 2, 11, 2, 5, 4
LA = "linear_attention_unnormalised"
# its linear memory
TITANS = {"optimizer": "momentum", "gate": {"kind": "scalar", "map": "logsigmoid", "order": "coupled"}}
linear_paths = pytest.mark.parametrize("path", ["definition", "recurrent", {"kind": "chunk", "chunk_size": 4}], ids=str)
frozen_paths = pytest.mark.parametrize("path", ["definition", "dual"])


class Draw:
    """Float64 numbers from one seeded stream."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self(*shape), dim=-1)

    def qkv(self, length: int = T) -> dict[str, Tensor]:
        """Queries, keys of unit length, values."""
        return {"q": self(B, length, H, DK), "k": self.unit(B, length, H, DK), "v": self(B, length, H, DV)}

    def rate(self, *width: int) -> Tensor:
        return self(B, T, H, *width).sigmoid()

    def log_decay(self, *width: int) -> Tensor:
        return F.logsigmoid(self(B, T, H, *width) + 1)

    def state(self) -> Tensor:
        return self(B, H, DK, DV)


Result = tuple[Tensor, ttr.State]


def run(spec: Any, path: Any = "auto", scale: float = 1.0, **arguments: Any) -> Result:
    return ttr.regress(**arguments, spec=spec, path=path, scale=scale)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to `tolerance` of the right side's largest entry."""
    assert left.shape == right.shape and torch.isfinite(left).all()
    error = (left - right).abs().max() / right.abs().max().clamp(min=1e-300)
    assert error < tolerance, f"relative error {error:.1e}"


def both(left: Result, right: Result) -> None:
    """Outputs and weights are equal."""
    close(left[0], right[0])
    close(left[1].weights["W"], right[1].weights["W"])


def zeros(*width: int) -> Tensor:
    return torch.zeros(B, T, H, *width, dtype=torch.float64)


def ones(*width: int) -> Tensor:
    return zeros(*width) + 1


def per_key(signal: Tensor) -> Tensor:
    return signal[..., None].expand(*signal.shape, DK)
