"""Launching a kernel: through triton's own runtime the first time, from then on straight to the compiled one.

Triton's runtime looks at every argument of every launch to find what it was compiled for; that takes longer than many of
these kernels run. Here the constants say it all: tensors lie on 16 bytes, and no number but the constants is specialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from .buffers import Piece


def kernel(numbers: str) -> Callable:
    """Decorator: a triton kernel whose run-time numbers (their names, apart by blanks) never make another compilation."""

    def make(fn: Callable) -> Kernel:
        return Kernel(triton.jit(do_not_specialize=numbers.split())(fn))

    return make


class Kernel:
    """A kernel and what it was compiled to, for all that are bound."""

    def __init__(self, fn: Any):
        self.fn = fn
        self.compiled: dict[tuple, tuple] = {}

    def bind(self, grid: tuple[int, ...], warps: int, stages: int = 1, together: bool = False, **constants: Any) -> Bound:
        """together: all programs run at the same time, or the launch fails. constants: the tl.constexpr parameters."""
        options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
        if together:
            options["launch_cooperative_grid"] = True
        return Bound(self, grid, options, constants)


class Bound:
    """A kernel with all that stays the same from call to call of one kind: grid, constants, options, and which arguments are None."""

    def __init__(self, kernel: Kernel, grid: tuple[int, ...], options: dict[str, Any], constants: dict[str, Any]):
        self.kernel, self.grid, self.options, self.constants = kernel, (*grid, 1, 1)[:3], options, constants
        self.ready: tuple | None = None

    def __call__(self, *arguments: Tensor | Piece | float | None) -> None:
        """arguments: in order."""
        if self.ready is None:
            self.ready = self.first(arguments)
            if self.ready is None:
                return
        run, device, function, metadata, rest = self.ready
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self.grid, stream, function, metadata, None, None, None, *arguments, *rest)

    def first(self, arguments: tuple) -> tuple | None:
        """What another bound call was compiled to, if it fits; otherwise compile and launch, and None."""
        types = tuple(getattr(x, "dtype", x is None) for x in arguments)
        device = next(x for x in arguments if isinstance(x, Tensor)).get_device()
        key = (device, *self.options.items(), types, tuple(self.constants.get(name) for name in self.kernel.fn.arg_names))
        known = self.kernel.compiled.get(key)
        if known is None:
            compiled = self.through_triton(*arguments)
            if compiled is not None:  # in the interpreter nothing is compiled
                rest = tuple(self.constants[name] for name in self.kernel.fn.arg_names[len(arguments) :])
                self.kernel.compiled[key] = compiled.run, device, compiled.function, compiled.packed_metadata, rest
        return known

    def through_triton(self, *arguments: Tensor | Piece | float | None) -> Any:
        """The way that looks at every argument: to compile, and for tensors that do not lie on 16 bytes."""
        return self.kernel.fn[self.grid](*arguments, **self.constants, **self.options)


def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """What a launch needs for its tensor descriptors, of torch's own allocator: ordered by stream, and by graph where one is made."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def prepare() -> None:
    """Before launches on CUDA, in the thread that makes them: the allocator is a context variable."""
    triton.set_allocator(allocate)
