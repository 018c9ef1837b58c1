"""Times on the GPU: medians of `triton.testing.do_bench`, contenders in turn, so that a drifting clock hits all alike.

Calls longer than half a second are timed once a round on the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

COPIED_BYTES = 2**31
MULTIPLIED = 8192  # rows and columns of the matrices that the rate of torch.matmul is taken on
SLOW_MS = 500  # a call that takes longer is timed once a round
STEPS = 20  # tokens in a row that a decoding time is taken over


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long each contender is timed, `rounds` times, after the compilation and `warm_up_ms`."""

    rounds: int = 3
    warm_up_ms: int = 25
    timed_ms: int = 100


QUICK = Effort(rounds=1, timed_ms=40)


class DeviceLost(RuntimeError):
    """An error on the device that spoils everything later in this process, as an illegal access does."""


class Failed(Exception):
    """The call of `who` raised while it was timed; the cause is its error."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


def check_device() -> None:
    """Gives cached memory back; raises DeviceLost when the CUDA context no longer works."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


def once_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call on the wall clock, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def median_ms(call: Callable[[], object], effort: Effort) -> float:
    """Of as many calls as `effort` has time for; of a slow one the only call."""
    if (ms := once_ms(call)) > SLOW_MS:
        return ms
    from triton.testing import do_bench  # here: tables and arguments are looked at where triton is not installed

    return float(do_bench(call, warmup=effort.warm_up_ms, rep=effort.timed_ms, return_mode="median"))  # type: ignore[arg-type]


def in_turn(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, float]:
    """Milliseconds of each call, the median over the rounds; raises Failed at the first that raises."""
    times: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(effort.rounds):
        for who, call in calls.items():
            try:
                times[who].append(median_ms(call, effort))
            except Exception as error:
                raise Failed(who) from error
    return {who: statistics.median(t) for who, t in times.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most device memory that one call holds beside what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bandwidth(effort: Effort) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (1e-3 * median_ms(lambda: target.copy_(source), effort))


def matmul_rate(effort: Effort) -> float:
    """Operations a second of a large torch.matmul in bf16."""
    a, b = (torch.randn(MULTIPLIED, MULTIPLIED, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    return 2 * MULTIPLIED**3 / (1e-3 * median_ms(lambda: torch.matmul(a, b), effort))


def eager_us(run: Callable[[], object], rounds: int = 15) -> float:
    """Microseconds a token on the wall clock, launches included, of a run of STEPS tokens."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / STEPS


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`, which ran before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
