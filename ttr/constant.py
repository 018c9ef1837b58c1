"""Facts about a declaration that are worked out once and are constants to torch.compile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import TypeVar

R = TypeVar("R")


class Declaration:
    """What a constant may be worked out of.

    torch.compile (2.11) passes no object of another library to a constant, but it does pass the name in `_known_as`.
    """

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_known_as"}  # another process has other names


_declarations: dict[str, Declaration] = {}
_names: dict[Declaration, str] = {}
_lock = threading.RLock()


def remember(declaration: Declaration) -> None:
    """Give a declaration its name in this process; equal ones share it. Raises TypeError for what is not hashable."""
    with _lock:  # comparing declarations runs Python, between which another thread could take the same number
        name = _names.get(declaration)
        if name is None:
            name = f"<{type(declaration).__name__} {len(_names)}>"
            _names[declaration], _declarations[name] = name, declaration
    object.__setattr__(declaration, "_known_as", name)


def constant(fn: Callable[..., R]) -> Callable[..., R]:
    """Cache a function of hashable arguments, Declarations among them, whose answers never change.

    torch.compile does not trace into it.
    """

    @cache
    def cached(*args):
        # in a thread of its own, where nobody looks on: torch.export traces even what torch.func does under disabled modes, and
        # derivatives inside inference mode are zeros on torch 2.11
        given = [_declarations.get(x, x) if isinstance(x, str) else x for x in args]
        with ThreadPoolExecutor(1) as apart:
            return apart.submit(fn, *given).result()

    @wraps(fn)
    def marked(*args):
        return cached(*args)

    # what torch.compiler.assume_constant_result does, without importing the compiler (two seconds) to say so
    marked._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(fn)
    def call(*args):
        return marked(*[getattr(x, "_known_as", x) if isinstance(x, Declaration) else x for x in args])

    return call
