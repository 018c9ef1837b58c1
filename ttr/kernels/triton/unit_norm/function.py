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
    """(x: [..., D], eps) -> x / sqrt(sum x^2 + eps) in x's dtype. Keeps x alone for backward."""

    @staticmethod
    def forward(x, eps):
        (x,) = ready(x)
        y = torch.empty_like(x)
        launch(unit_norm_kernel, x, y, eps=eps)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.eps = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        # where a second derivative is wanted
        if torch.is_grad_enabled() or must_be_seen(dy):
            return _gradient(x, dy, ctx.eps), None
        x, dy = ready(x, dy)
        dx = torch.empty_like(x)
        launch(unit_norm_gradient_kernel, x, dy, dx, eps=ctx.eps)
        return dx, None


def _gradient(x: Tensor, dy: Tensor, eps: float) -> Tensor:
    """The gradient in torch's own operations, which can be differentiated again."""
    wide, given = x.float(), dy.float()
    r = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    y = wide * r
    return (r * (given - y * (y * given).sum(-1, keepdim=True))).to(x.dtype)


def launch(kernel: Any, *tensors: Tensor, eps: float) -> None:
    x = tensors[0]
    D, device = x.shape[-1], x.get_device()
    rows = x.numel() // D
    launched(_bound(kernel, rows, D, x.dtype, device), *tensors, rows, eps)


@lru_cache(maxsize=1024)
def _bound(kernel: Any, rows: int, D: int, dtype: torch.dtype, device: int) -> Bound:
    """dtype, device: for each of which a bound kernel is another one."""
    block = power_of_two(D)
    n = max(1, ELEMENTS // block)
    return kernel.bind((ceil_div(rows, n),), WARPS, D=D, BLOCK=block, ROWS=n)
