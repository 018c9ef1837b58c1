"""The readout normaliser: while a path runs it is one more value channel of W, whose target is always one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spec import Read
from ..state import State


def with_ones(v: Tensor) -> Tensor:
    """v: [..., dv] -> [..., dv + 1]."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def join(state: State) -> State:
    """W and normalizer: [N, H, dk, 1] as one matrix, in the weights, the slots and an open mini-batch."""
    return _map_weights(state, lambda tree: {"W": torch.cat([tree["W"], tree["normalizer"]], -1)})


def split(state: State) -> State:
    """The inverse of `join`."""
    return _map_weights(state, lambda tree: {"W": tree["W"][..., :-1], "normalizer": tree["W"][..., -1:]})


def normalize(o: Tensor, read: Read) -> Tensor:
    """o: [..., dv + 1] -> o / (n + eps) (`sum`) or o / max(|n|, 1) (`max1`), [..., dv]."""
    o, n = o[..., :-1], o[..., -1:]
    return o / (n + read.eps) if read.normalizer == "sum" else o / n.abs().clamp_min(1.0)


def _map_weights(state: State, fn: Callable[[dict], dict]) -> State:
    """Apply `fn` to every mapping of the state that holds a W."""

    def visit(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return fn(tree) if "W" in tree else {k: visit(v) for k, v in tree.items()}

    return replace(state, weights=visit(state.weights), slots=visit(state.slots), mini_batch=visit(state.mini_batch))
