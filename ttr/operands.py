"""Large products with 16-bit operands: what a call in bf16 multiplies, while all else stays float32."""

from __future__ import annotations

import torch
from torch import Tensor


def operands_of(widest: torch.dtype | None) -> torch.dtype | None:
    """The dtype that large products of a call take, of the widest of q, k and v; None: that of its numbers.

    fp16 stays in float32: gradients that a memory takes of itself have no loss scale, and what they lose below 6e-5 is more
    than bf16 rounds (OmegaNet's weights were off by 8e-2, in bf16 by 4e-3).
    """
    return widest if widest == torch.bfloat16 else None


def product(a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
    """a @ b in a's dtype. operands: what both are rounded to before; None: nothing.

    As in `torch.autocast`, a product is summed in float32 and comes out rounded to `operands` once (bf16: by 2^-9 of an entry
    at most), so what many products add up to is to be added here, outside. Backward multiplies in the same way, at every order.
    Products that come out in float32 (out_dtype) have no kernel on a CPU and no rule for vmap in torch 2.13, and vmap of an
    autograd.Function that would make them cannot be compiled.
    """
    return a @ b if operands is None else (a.to(operands) @ b.to(operands)).to(a.dtype)
