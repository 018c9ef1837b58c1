"""The compositions at small sizes, for the tests beside this file."""

from __future__ import annotations

import pytest
import torch

import ttr
from ttr.layers import ComposedLayer

D, B, T = 32, 2, 23
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
MEMORY = {"compose.memory.optimizer.mini_batch": 4, "compose.memory.layer.n_heads": 2}
WINDOW = {"compose.window.regressor.window": 6, "compose.window.layer.n_heads": 4}
SMALL = {
    "lact_layer": {**MEMORY, **WINDOW},
    "titans_mac": {**MEMORY, "compose.segment": 6, "compose.attention.layer.n_heads": 4},
    "titans_mag": {**MEMORY, **WINDOW},
    "titans_mal": {**MEMORY, **WINDOW},
}
every = pytest.mark.parametrize("name", SMALL)


def make(name: str, **more) -> ComposedLayer:
    """In float64, with mini-batches, windows and segments that end inside T tokens, at unlike places."""
    torch.manual_seed(0)
    layer = ttr.layer(D, ttr.declare(name, **{**SMALL[name], **more}), layer_idx=1, n_layers=3).double()
    assert isinstance(layer, ComposedLayer)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def leaves(state) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_flatten(state)[0]
