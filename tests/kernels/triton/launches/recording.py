"""Launches as run.forward and run.backward make them, written down instead of made."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]  # the kernel, its positional arguments, its keyword arguments
Named = Iterator[tuple[str, Launch, bool]]


@contextmanager
def recorded(device: str = "meta") -> Iterator[list[Launch]]:
    """The launches of what is called inside, on tensors of this device."""
    found: list[Launch] = []
    record = mock.patch.object(JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: found.append((kernel, args, kwargs)))
    with record, torch.device(device):
        yield found
