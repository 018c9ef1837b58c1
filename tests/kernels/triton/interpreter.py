"""Triton's interpreter, twice as fast: it patches triton.language anew at every call of a device function, here once a launch."""

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Leave the modules alone that a call further out has patched, and will restore."""
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
