"""The kernels as a differentiable function."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...eager import must_be_seen
from ..launch import Bound
from ..operators import launched, ready
from ..shapes import ceil_div, power_of_two
from .kernels import short_conv_gradient_kernel, short_conv_kernel

ROWS, TOKENS, WIDEST, WARPS = 16, 256, 128, 4  # tokens of a tile and of a program of backward, channels of a tile
NUMBERS = 64  # of a channel and program of backward: the tile's tokens for every lag


class ShortConv(torch.autograd.Function):
    """(x: [B, T, D], weight: [D, K], history: [N, K - 1, D] or None, sequence, index, formula, silu) -> y: [B, T, D], all of one dtype.

    sequence, index: of a packed row [1, T, D], each token's sequence and place in it; else None. formula: (x, weight) -> y, before
    any SiLU, in torch's own operations, for derivatives of backward. No gradient goes to the history. Kept for backward is x:
    what SiLU is taken of is made again.
    """

    @staticmethod
    def forward(x, weight, history, sequence, index, formula, silu):
        x, weight, history = ready(x, weight, history)
        y = torch.empty_like(x)
        launch(short_conv_kernel, x, weight, history, sequence, index, None, y, silu=silu)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.formula, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        x, weight, history, sequence, index = ctx.saved_tensors
        if torch.is_grad_enabled() or must_be_seen(dy):
            again = torch.is_grad_enabled()
            with torch.enable_grad():  # of views, where each may have been made of the other: no gradient goes on behind them
                given = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in (x, weight)]
                needed = [one for one, wanted in zip(given, ctx.needs_input_grad, strict=False) if wanted]
                y = ctx.formula(*given)
                got = iter(torch.autograd.grad(F.silu(y) if ctx.silu else y, needed, dy, create_graph=again))
            return *(next(got) if wanted else None for wanted in ctx.needs_input_grad[:2]), *[None] * 5
        x, weight, history, dy = ready(x, weight, history, dy)
        if ctx.silu:
            upstream, dy = dy, torch.empty_like(dy)
            launch(short_conv_kernel, x, weight, history, sequence, index, upstream, dy, silu=True)
        parts = ceil_div(x.shape[0] * x.shape[1], TOKENS)
        dx, dweight = torch.empty_like(x), x.new_empty((parts, weight.shape[1], weight.shape[0]), dtype=torch.float32)
        launch(short_conv_gradient_kernel, x, weight, history, sequence, index, dy, dx, dweight)
        return dx, dweight.sum(0).t().to(weight.dtype), *[None] * 5


def launch(kernel: Any, x: Tensor, weight: Tensor, *rest: Tensor | None, silu: bool | None = None) -> None:
    """silu: of the kernel that has it."""
    B, T, D = x.shape
    types = x.dtype, rest[0] is None, rest[3] is None, x.get_device()
    bound = _bound(kernel, B * T, D, weight.shape[1], rest[1] is not None, silu, types)
    launched(bound, x, weight, *rest, B * T, T)


@lru_cache(maxsize=1024)
def _bound(kernel: Any, total: int, D: int, K: int, packed: bool, silu: bool | None, types: tuple) -> Bound:
    """types: the dtype of all, what is None, the device: for each of which a bound kernel is another one."""
    block = min(WIDEST, power_of_two(D))
    if kernel is short_conv_gradient_kernel:
        rows = max(1, min(ROWS, NUMBERS // power_of_two(K)))
        grid, more = (ceil_div(total, TOKENS), ceil_div(D, block)), {"ROWS": rows, "STEPS": TOKENS // rows}
    else:
        grid, more = (ceil_div(total, ROWS), ceil_div(D, block)), {"ROWS": ROWS, "SILU": silu}
    return kernel.bind(grid, WARPS, D=D, K=K, PACKED=packed, BLOCK=block, **more)
