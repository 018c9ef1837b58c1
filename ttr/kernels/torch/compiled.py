"""A function compiled when it is first called, and eager, with a warning, where it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

KINDS = 64  # of inputs (shapes, dtypes, with or without gradients) that one function is compiled for


def compiled_once(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """fn through torch.compile, for each kind of inputs when it first comes; inside another compilation just fn.

    Should it fail, a warning says so, and fn runs as it is from then on.
    """
    run: Callable[..., Any] | None = torch.compile(fn, fullgraph=True, dynamic=False)

    def call(*args: Any) -> Any:
        nonlocal run
        if run is None or torch.compiler.is_compiling():
            return fn(*args)
        try:
            with torch._dynamo.config.patch(recompile_limit=KINDS, accumulated_recompile_limit=16 * KINDS):
                return run(*pytree.tree_map_only(torch.Tensor, alike, args))
        except TorchDynamoException as error:
            run = None
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"{name} could not be compiled and runs eagerly: {reason}", stacklevel=2)
            return fn(*args)

    return call


def alike(x: Tensor) -> Tensor:
    """x in the form that makes no further compilation: in one piece, and wanting a gradient where gradients are taken."""
    x = x.contiguous()
    return x.detach().requires_grad_() if torch.is_grad_enabled() and x.is_floating_point() and not x.requires_grad else x
