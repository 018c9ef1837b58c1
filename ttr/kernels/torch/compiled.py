"""A function compiled when it is first called, and eager, with a warning, where it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .recompute import transformed

KINDS = 64  # of inputs (shapes, dtypes, with or without gradients) that one function is compiled for
LIMITS = {"recompile_limit": KINDS, "accumulated_recompile_limit": 16 * KINDS}


def compiled_once(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """fn through torch.compile, for each kind of inputs when it first comes; inside another compilation just fn.

    Should it fail, a warning says so, and fn runs as it is from then on.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # the compiler takes seconds to import

    run: Callable[..., Any] | None = torch.compile(fn, fullgraph=True, dynamic=False)

    def eager(error: Exception, args: tuple) -> Any:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"{name} could not be compiled and runs eagerly: {reason}", stacklevel=2)
        return fn(*args)

    def call(*args: Any) -> Any:
        nonlocal run
        if run is None or transformed():
            return fn(*args)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
        given = pytree.tree_map_only(Tensor, partial(alike, learns=learns), args)
        try:
            with torch.set_grad_enabled(learns), torch._dynamo.config.patch(LIMITS):
                return run(*given)
        except FailOnRecompileLimitHit as error:  # of too many kinds; those that are compiled stay
            return eager(error, args)
        except TorchDynamoException as error:
            run = None
            return eager(error, args)

    return call


def alike(x: Tensor, learns: bool) -> Tensor:
    """x in the form that makes no further compilation: in one piece, and all wanting a gradient where one of them does."""
    x = x.contiguous()
    return x.detach().requires_grad_() if learns and x.is_floating_point() and not x.requires_grad else x
