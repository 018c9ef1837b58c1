"""Random inputs for the oracles' own tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import DK, DV, B, H, T, unit


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Normal numbers from one seeded stream, float64."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def qkv(draw) -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, T, H, DK), unit(draw(B, T, H, DK)), draw(B, T, H, DV)


@pytest.fixture
def step(draw) -> Tensor:
    return draw(B, T, H).sigmoid()


@pytest.fixture
def log_decay(draw) -> Tensor:
    return F.logsigmoid(draw(B, T, H) + 1)
