"""The weights of the dual form: what stands in for a matrix while a regressor predicts, so that `ttr.linear` finds it.

slots and rows: a weight is sum_k rows_k z_k, row by row of what it is multiplied with; rows None: z_0 itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunk import sum_of

Weights = dict[str, Tensor]
Slots = tuple[Tensor, ...]
Product = Callable[[Tensor, Tensor], Tensor]  # of large matrices


class Looked:
    """A weight as the gradient sees it, at every event. It records what enters the layer."""

    def __init__(
        self, name: str, slots: Slots, rows: Tensor | None, taps: Weights, inputs: dict[str, tuple[Tensor, str | None]], product: Product
    ):
        self.name, self.slots, self.rows, self.taps, self.inputs, self.product = name, slots, rows, taps, inputs, product

    def ttr_linear(self, x: Tensor, bias: Looked | None) -> Tensor:
        self.inputs[self.name] = (x, None if bias is None else bias.name)
        y = _through(self, x)
        if bias is not None:
            y = y + _vectors(bias)
        return y + self.taps[self.name]  # a zero whose gradient is the loss's gradient at the layer's output


class Moved:
    """A weight as token t reads it: the slots of the start and every event's outer product, under the mask R."""

    def __init__(self, slots: Slots, rows: Tensor | None, written: tuple[Tensor, Tensor, Tensor] | None, product: Product):
        self.slots, self.rows, self.written, self.product = slots, rows, written, product

    def ttr_linear(self, h: Tensor, bias: Moved | None) -> Tensor:
        y = _through(self, h)
        if bias is not None:
            y = y + _vectors(bias)
        if self.written is not None:
            mask, x, d = self.written
            scores = self.product(h, x.mT)
            y = y + self.product(mask * (scores if bias is None else scores + 1), d)  # a bias is a weight whose input is 1
        return y


def _through(weight: Looked | Moved, x: Tensor) -> Tensor:
    if weight.rows is None:
        return weight.product(x, weight.slots[0])
    return sum_of(row[:, None] * weight.product(x, z) for row, z in zip(weight.rows, weight.slots, strict=True))


def _vectors(bias: Looked | Moved) -> Tensor:
    return bias.slots[0] if bias.rows is None else bias.rows.T @ torch.stack(bias.slots)


class Made:
    """A weight as every token reads it, [T, ...]: for a map that needs all of its entries."""

    def __init__(self, weights: Tensor):
        self.weights = weights

    def ttr_linear(self, h: Tensor, bias: Made | None) -> Tensor:
        y = torch.einsum("ti,tio->to", h, self.weights)
        return y if bias is None else y + bias.weights
