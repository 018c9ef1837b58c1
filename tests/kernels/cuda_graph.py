"""A call captured by a CUDA graph, which fails where the call asks the host for anything."""

from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


def captured(run: Callable[[], R], warm: Callable[[], object] | None = None) -> tuple[torch.cuda.CUDAGraph, R]:
    """The graph, and what the captured call gave: filled anew at every replay. warm: what is called first, if not `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            (warm or run)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    return graph, given
