"""Triton's interpreter, twice as fast, and strict about memory."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """It patches triton.language anew at every call of a device function; here once a launch.

    Leaves the modules alone that a call further out has patched, and will restore.
    """
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def once(fn):
        mine = {id(module) for module in (tl, tl.core) if any(x is module for x in fn.__globals__.values())} - patched
        if not mine:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        patched.update(mine)
        restore = scope.restore

        def release() -> None:
            restore()
            patched.difference_update(mine)

        scope.restore = release
        return scope

    interpreter._patch_lang = once


class OutOfBounds(AssertionError):
    """A launch touched memory that belongs to none of its arguments."""


def guard_memory() -> None:
    """Every number a launch loads or stores must lie in one of its arguments: on a GPU it would be somebody else's, here the heap's."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    to_host, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    known: dict[str, Any] = {}

    def remember(self, args, kwargs):
        on_host = to_host(self, args, kwargs)
        spans: list[list[int]] = []
        for begin, end in sorted(span(x) for x in [*on_host[0], *on_host[1].values()] if hasattr(x, "untyped_storage") and x.numel()):
            if spans and begin < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([begin, end])
        known["name"], known["begins"], known["ends"] = self.fn.__name__, *np.array(spans or [[0, 0]], dtype=np.uint64).T
        return on_host

    def check(pointers, mask, what: str) -> None:
        wanted = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.uint64)
        size = np.uint64(np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize)
        place = np.searchsorted(known["begins"], wanted, side="right").astype(np.int64) - 1
        outside = int(((place < 0) | (wanted + size > known["ends"][np.maximum(place, 0)])).sum())
        if outside:
            raise OutOfBounds(f"{known['name']}: {what} of {outside} numbers outside of its arguments, of {wanted.size}")

    def checked_load(self, pointers, mask, *args, **kwargs):
        check(pointers, mask, "a load")
        return load(self, pointers, mask, *args, **kwargs)

    def checked_store(self, pointers, value, mask, *args, **kwargs):
        check(pointers, mask, "a store")
        return store(self, pointers, value, mask, *args, **kwargs)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = remember, checked_load, checked_store


def span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first number and behind its last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
