"""The weights of the dual form: what stands in for a matrix while a regressor predicts, so that `ttr.linear` finds it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunk import sum_of

Weights = dict[str, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]  # of large matrices


class Looked:
    """A weight as the gradient sees it: sum_k c_ek z_k at event e. It records what enters the layer."""

    def __init__(
        self, name: str, slots: tuple[Tensor, ...], rows: Tensor, taps: Weights, inputs: dict[str, tuple[Tensor, str | None]],
        product: Product,
    ):  # fmt: skip
        self.name, self.slots, self.rows, self.taps, self.inputs, self.product = name, slots, rows, taps, inputs, product

    def ttr_linear(self, x: Tensor, bias: Looked | None) -> Tensor:
        self.inputs[self.name] = (x, None if bias is None else bias.name)
        y = sum_of(c[:, None] * self.product(x, z) for c, z in zip(self.rows, self.slots, strict=True))
        if bias is not None:
            y = y + bias.rows.T @ torch.stack(bias.slots)
        return y + self.taps[self.name]  # a zero whose gradient is the loss's gradient at the layer's output


class Moved:
    """A weight as token t reads it: the slots of the start and every event's outer product, under the mask R."""

    def __init__(self, slots: tuple[Tensor, ...], rows: Tensor, mask: Tensor, written: tuple[Tensor, Tensor] | None, product: Product):
        self.slots, self.rows, self.mask, self.written, self.product = slots, rows, mask, written, product

    def ttr_linear(self, h: Tensor, bias: Moved | None) -> Tensor:
        y = sum_of(row[:, None] * self.product(h, z) for row, z in zip(self.rows, self.slots, strict=True))
        if bias is not None:
            y = y + bias.rows.T @ torch.stack(bias.slots)
        if self.written is not None:
            x, d = self.written
            scores = self.product(h, x.mT)
            y = y + self.product(self.mask * (scores if bias is None else scores + 1), d)  # a bias is a weight whose input is 1
        return y


class Made:
    """A weight as every token reads it, [T, ...]: for a map that needs all of its entries."""

    def __init__(self, weights: Tensor):
        self.weights = weights

    def ttr_linear(self, h: Tensor, bias: Made | None) -> Tensor:
        y = torch.einsum("ti,tio->to", h, self.weights)
        return y if bias is None else y + bias.weights
