"""The kernels as a differentiable function."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...eager import must_be_seen
from ..launch import Bound
from ..operators import launched, ready
from ..shapes import ceil_div, power_of_two
from .kernels import unit_norm_gradient_kernel, unit_norm_kernel

ELEMENTS, WARPS = 4096, 4  # of a program


class UnitNorm(torch.autograd.Function):
    """(x: [..., D], eps) -> y = r x in x's dtype, and r = 1 / sqrt(sum x^2 + eps), [..., 1] in float32.

    Backward takes y and r, not x: y is there anyway, where it is a key or a query. Who changes y in place gets autograd's error.
    """

    @staticmethod
    def forward(x, eps):
        (x,) = ready(x)
        y, r = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        launch(unit_norm_kernel, x, y, r, eps=eps)
        return y, r

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, dy, dr):
        y, r = ctx.saved_tensors
        if dy is None or dr is not None or torch.is_grad_enabled() or must_be_seen(dy):  # a second derivative asks r too
            return _gradient(y, r, dy, dr), None
        y, dy = ready(y, dy)
        dx = torch.empty_like(y)
        launch(unit_norm_gradient_kernel, y, r, dy, dx)
        return dx, None


def _gradient(y: Tensor, r: Tensor, dy: Tensor | None, dr: Tensor | None) -> Tensor | None:
    """The gradient in torch's own operations, which can be differentiated again."""
    wide, dx = y.float(), None
    if dy is not None:
        given = dy.float()
        dx = r * (given - wide * (wide * given).sum(-1, keepdim=True))
    if dr is not None:
        of_rate = -(r * r * dr) * wide
        dx = of_rate if dx is None else dx + of_rate
    return None if dx is None else dx.to(y.dtype)


def launch(kernel: Any, *tensors: Tensor, **numbers: float) -> None:
    x = tensors[0]
    D, device = x.shape[-1], x.get_device()
    rows = x.numel() // D
    launched(_bound(kernel, rows, D, x.dtype, device), *tensors, rows, *numbers.values())


@lru_cache(maxsize=1024)
def _bound(kernel: Any, rows: int, D: int, dtype: torch.dtype, device: int) -> Bound:
    """dtype, device: for each of which a bound kernel is another one."""
    block = power_of_two(D)
    n = max(1, ELEMENTS // block)
    return kernel.bind((ceil_div(rows, n),), WARPS, D=D, BLOCK=block, ROWS=n)
