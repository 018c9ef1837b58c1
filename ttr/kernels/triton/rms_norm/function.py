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
from .kernels import rms_norm_gradient_kernel, rms_norm_kernel

ELEMENTS, WARPS, STEPS = 4096, 4, 8  # of a tile, of a program; tiles of a program of backward


class RMSNorm(torch.autograd.Function):
    """(x: [..., D], weight: [D], eps) -> w r x, of one dtype, and r = 1 / sqrt(mean x^2 + eps), [..., 1] in float32."""

    @staticmethod
    def forward(x, weight, eps):
        x, weight = ready(x, weight)
        y, r = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        rows, D = _rows(x)
        launched(_bound(rms_norm_kernel, rows, D, x.dtype, x.get_device()), x, weight, y, r, rows, eps)
        return y, r

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, _dr):
        x, weight, r = ctx.saved_tensors
        if dy is None:
            return None, None, None
        if torch.is_grad_enabled() or must_be_seen(dy):  # where a second derivative is wanted: of r too, which is made again
            return *_gradients(x, weight, dy, ctx.eps), None
        x, weight, dy = ready(x, weight, dy)
        rows, D = _rows(x)
        bound = _bound(rms_norm_gradient_kernel, rows, D, x.dtype, x.get_device())
        dx, dweight = torch.empty_like(x), r.new_empty((bound.grid[0], D))
        launched(bound, x, weight, r, dy, dx, dweight, rows)
        return dx, dweight.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _gradients(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients in torch's own operations, which can be differentiated again."""
    wide, given = x.float(), dy.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, weighed = wide * r, given * weight.float()
    dx = r * (weighed - unit * (unit * weighed).mean(-1, keepdim=True))
    dw, rows = given * unit, tuple(range(x.ndim - 1))
    return dx.to(x.dtype), (dw.sum(rows) if rows else dw).to(weight.dtype)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


@lru_cache(maxsize=1024)
def _bound(kernel: Any, rows: int, D: int, dtype: torch.dtype, device: int) -> Bound:
    """dtype, device: for each of which a bound kernel is another one."""
    block = power_of_two(D)
    n, more = max(1, ELEMENTS // block), {"STEPS": STEPS} if kernel is rms_norm_gradient_kernel else {}
    return kernel.bind((ceil_div(rows, n * more.get("STEPS", 1)),), WARPS, D=D, BLOCK=block, ROWS=n, **more)
