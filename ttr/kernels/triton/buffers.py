"""Many arrays in one allocation: what a call keeps or works in would otherwise take a dozen, each longer to ask for than a launch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as torch's own allocations lie

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype)


class Piece:
    """A part of a buffer on the GPU as a launch sees it: Triton takes whatever has a dtype and a data_ptr()."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype):
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        return self.pointer


class Layout:
    """Where every array lies in a buffer of `size` bytes. Sizes may be symbols."""

    def __init__(self, shapes: Shapes):
        self.size, self.places = 0, {}
        for name, (shape, dtype) in shapes.items():
            self.places[name] = self.size, shape, dtype
            self.size += (prod(shape) * dtype.itemsize + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT

    def make(self, like: Tensor) -> Tensor:
        return like.new_empty((self.size,), dtype=torch.uint8)

    def arrays(self, buffer: Tensor) -> dict[str, Tensor | Piece]:
        """name -> array; on the GPU, where making a tensor takes longer than a launch, a Piece. It does not keep the buffer alive."""
        if buffer.is_cuda:
            base = buffer.data_ptr()
            return {name: Piece(base + offset, dtype) for name, (offset, _, dtype) in self.places.items()}
        return {
            name: buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (offset, shape, dtype) in self.places.items()
        }
