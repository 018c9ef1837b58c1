"""Launching a kernel: through triton's own runtime the first time, from then on straight to the compiled one.

Triton's runtime looks at every argument of every launch to find what it was compiled for; that takes longer than many of
these kernels run. Here the constants say it all: tensors lie on 16 bytes, and no number but the constants is specialised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor


def kernel(numbers: str) -> Callable:
    """Decorator: a triton kernel whose run-time numbers (their names, apart by blanks) never make another compilation."""

    def make(fn: Callable) -> Kernel:
        return Kernel(triton.jit(do_not_specialize=numbers.split())(fn))

    return make


class Kernel:
    """A kernel and what it was compiled to."""

    def __init__(self, fn: Any):
        self.fn = fn
        self.compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 1, **constants: Any) -> None:
        """arguments: tensors, numbers and None, in order. constants: the tl.constexpr parameters."""
        types = tuple([x.dtype if isinstance(x, Tensor) else x is None for x in arguments])
        first = next(x for x in arguments if isinstance(x, Tensor))
        key = (first.get_device(), num_warps, num_stages, types, tuple(constants.values()))
        known = self.compiled.get(key)
        if known is None:
            compiled = self.fn[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
            if compiled is not None:  # in the interpreter nothing is compiled
                self.compiled[key] = compiled, tuple(constants[name] for name in self.fn.arg_names[len(arguments) :])
            return
        compiled, rest = known
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(key[0])
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *rest)


_scratch: dict[tuple[int, int], Tensor] = {}  # (device, stream) -> where its launches keep their tensor descriptors


def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """What a launch needs for its tensor descriptors; one piece serves all launches of a stream, which come one after another."""
    if torch.cuda.is_current_stream_capturing():  # a graph may be replayed beside anything
        return torch.empty(size, dtype=torch.int8, device="cuda")
    key = torch.cuda.current_device(), stream or 0
    kept = _scratch.get(key)
    if kept is None or kept.numel() < size:
        _scratch[key] = kept = torch.empty(size, dtype=torch.int8, device="cuda")
    return kept


def prepare() -> None:
    """Before launches on CUDA, in the thread that makes them: the allocator is a context variable."""
    triton.set_allocator(allocate)
