"""Backward through a long loop without its graph: what lies between two steps that are kept is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def recomputed(fn: Callable[..., Any], *trees: Any) -> Any:
    """fn(*trees), trees of tensors in and out; backward holds on to the inputs alone and runs fn once more.

    fn must be a function of its arguments: the second run says what the derivatives are, of any order. Where nothing is
    differentiated it just runs; inside torch.compile, torch.func and forward mode as well, which see its graph.
    torch.utils.checkpoint cannot be used here: torch.func.grad does not work under saved-tensor hooks.
    """
    flat, structure = pytree.tree_flatten(trees)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in flat) or transformed():
        return fn(*trees)
    out: list[Any] = []
    results = Recomputed.apply(fn, structure, out, *flat)
    return pytree.tree_unflatten(results, out[0])


def transformed() -> bool:
    """Whether torch.compile, torch.func or forward mode looks on."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0  # type: ignore[attr-defined]
    )


class Recomputed(torch.autograd.Function):
    """out: a list that receives the structure of the results, which are flat."""

    @staticmethod
    def forward(ctx, fn, structure, out, *flat):
        ctx.fn, ctx.structure = fn, structure
        device = flat[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        results, shape = pytree.tree_flatten(fn(*pytree.tree_unflatten(flat, structure)))
        out.append(shape)
        ctx.mark_non_differentiable(*[x for x in results if not x.is_floating_point()])
        return tuple(results)

    @staticmethod
    def backward(ctx, *gradients):
        again = torch.is_grad_enabled()  # a derivative of the gradients is wanted: they hang on the saved tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):  # as it was, wherever backward is called
            flat = [x.view_as(x) if again else x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
            results = pytree.tree_leaves(ctx.fn(*pytree.tree_unflatten(flat, ctx.structure)))
            wanted: list[Tensor] = [x for x in flat if x.requires_grad]
            known = [(x, g) for x, g in zip(results, gradients, strict=True) if g is not None and x.requires_grad]
            outputs, given = [x for x, _ in known], [g for _, g in known]
            got = torch.autograd.grad(outputs, wanted, given, allow_unused=True, create_graph=again) if known else [None] * len(wanted)
        by_input = iter(got)
        return None, None, None, *(next(by_input) if x.requires_grad else None for x in flat)
