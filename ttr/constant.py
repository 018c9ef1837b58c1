"""Facts about a declaration that are worked out once and are constants to torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

R = TypeVar("R")


class Declaration:
    """What a constant may be worked out of.

    torch.compile (2.11) passes no object of another library to a constant, but it does pass the name in `_known_as`.
    """

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_known_as"}  # another process has other names


_declarations: dict[str, Declaration] = {}
_names: dict[Declaration, str] = {}


def remember(declaration: Declaration) -> None:
    """Give a declaration its name in this process; equal ones share it."""
    name = _names.setdefault(declaration, f"<{type(declaration).__name__} {len(_names)}>")
    _declarations.setdefault(name, declaration)
    object.__setattr__(declaration, "_known_as", name)


def constant(fn: Callable[..., R]) -> Callable[..., R]:
    """Cache a pure function of hashable arguments, Declarations among them; a compiled caller does not trace into it."""

    @cache
    def cached(*args):
        # for real, also while torch.export or a fake mode looks on; derivatives inside inference mode are zeros on torch 2.11
        with _disable_current_modes(), torch.inference_mode(False):
            return fn(*(_declarations.get(x, x) if isinstance(x, str) else x for x in args))

    @wraps(fn)
    def marked(*args):
        return cached(*args)

    # what torch.compiler.assume_constant_result does, without importing the compiler (two seconds) to say so
    marked._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(fn)
    def call(*args):
        return marked(*[getattr(x, "_known_as", x) if isinstance(x, Declaration) else x for x in args])

    return call
