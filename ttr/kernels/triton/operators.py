"""What the operators of these kernels have in common: how one is registered, and how autograd meets it. Importable without triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from .eligible import interpreted

fragment = library.Library("ttr", "FRAGMENT")
TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
# for `gradients`: the paths that have a second derivative
CHUNK = "use path='chunk' (or recurrent) where a gradient is differentiated"
DUAL = "use path='dual' where a gradient is differentiated"


def operator(schema: str, kernel: Callable, fake: Callable, tags: Sequence[torch.Tag] = TAGS) -> torch._ops.OpOverload:
    """ttr::`schema`, whose first argument is a tensor.

    kernel: of its arguments by position, called with that tensor's device as the current one, or in Triton's interpreter.
    fake: what torch.compile calls instead, for shapes alone.
    """
    name = schema.partition("(")[0]
    fragment.define(schema, tags=tags)
    fragment.impl(name, _on_its_device(kernel), "CUDA")
    fragment.impl(name, _on_cpu(kernel), "CPU")
    library.register_fake(f"ttr::{name}", fake, lib=fragment)
    return getattr(torch.ops.ttr, name).default


def _on_its_device(kernel: Callable) -> Callable:
    def call(x, *args):
        if x.get_device() == torch.cuda.current_device():
            return kernel(x, *args)
        with torch.cuda.device(x.get_device()):  # triton launches on the current one
            return kernel(x, *args)

    return call


def _on_cpu(kernel: Callable) -> Callable:
    def call(*args):
        if not interpreted():
            raise RuntimeError(
                "ttr's Triton kernels run on CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1 before triton is imported"
            )
        return kernel(*args)

    return call


def ready(*tensors: Tensor | None) -> list[Any]:
    """Contiguous, and on the 16 bytes that launches and the tensor memory accelerator count on."""
    return [
        x if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0) else x.clone(memory_format=torch.contiguous_format)
        for x in tensors
    ]


def launched(bound: Callable, x: Tensor, *args: Any) -> None:
    """bound(x, *args) on the device of x; in the interpreter, on a CPU."""
    device = x.get_device()
    if device < 0 or device == torch.cuda.current_device():
        bound(x, *args)
    else:
        with torch.cuda.device(device):  # triton launches on the current one
            bound(x, *args)


def empty_likes(*tensors: Tensor | None) -> list[Tensor]:
    """As kernels make them: contiguous, and none for None."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient is wanted; forward mode counts, so that the Function refuses it."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def apply(function: type[torch.autograd.Function], *args):
    """Function.apply; without what it does for default arguments at every call, which no caller here leaves to it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def gradients(kernel: Callable, instead: str) -> Callable[..., list[Tensor | None]]:
    """The gradients as a function of its own, so that a second derivative is refused instead of being wrong.

    What comes back takes (tensors, *args) and gives a gradient for each of `tensors`, None for None; kernel(*args) gives those that
    there are, in this order. instead: what the error says to do.
    """

    class Gradients(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return tuple(kernel(*args))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(f"path='triton' has no second derivative; {instead}")

    def call(tensors, *args):
        got = iter(Gradients.apply(*args) if torch.is_grad_enabled() else kernel(*args))
        return [None if x is None else next(got) for x in tensors]

    return call
