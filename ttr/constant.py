"""Facts about a declaration that are worked out once and are constants to torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

R = TypeVar("R")


def constant(fn: Callable[..., R]) -> Callable[..., R]:
    """Cache a pure function of hashable declarations; a compiled caller does not trace into it."""

    @cache
    def cached(*args):
        # for real, also while torch.export or a fake mode looks on; derivatives inside inference mode are zeros on torch 2.11
        with _disable_current_modes(), torch.inference_mode(False):
            return fn(*args)

    @wraps(fn)
    def call(*args):
        return cached(*args)

    # what torch.compiler.assume_constant_result does, without importing the compiler (two seconds) to say so
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call
