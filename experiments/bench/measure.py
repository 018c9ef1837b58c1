"""The measurements themselves: every function yields rows as they come; what raises becomes a row with its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ttr
from experiments.bench import calls, peers, timing
from experiments.bench.cases import Case, inputs
from experiments.bench.record import Row
from experiments.bench.shapes import Shape, floor_bytes
from experiments.bench.timing import STEPS, Effort


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all measurements of one run share; `bandwidth` in bytes a second."""

    bandwidth: float
    effort: Effort

    def floor_ms(self, shape: Shape, kind: str) -> float:
        return 1e3 * floor_bytes(shape, kind) / self.bandwidth


def error_row(row: Row, error: BaseException) -> Row:
    lines = f"{type(error).__name__}: {error}".splitlines()
    return {**row, "error": lines[0][:300]}


def relative_difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in Frobenius norms."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def sequence(bench: Bench, kind: str, case: Case, shape: Shape, whos: tuple[str, ...], compare: bool) -> Iterator[Row]:
    """`forward` or `both` (forward and backward) of every contender, ours first.

    Peers carry their output's difference from ours, which is computed once more where `compare` says that `whos` lacks it.
    """
    x = inputs(case, shape, requires_grad=kind == "both")
    reference = calls.call(case, "ttr")(x) if compare and kind == "forward" else None
    upstream = torch.randn_like(x.v)
    ready: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    with ExitStack() as stack:
        for who in whos:
            row: Row = {"kind": kind, "case": case.name, "shape": shape.name, "who": who, "floor_ms": bench.floor_ms(shape, kind)}
            try:
                run = _run(calls.call(case, who), x, upstream, kind)
                try:
                    o = run()
                except RuntimeError as error:
                    if who != "fla" or not peers.refused_by_check(error):
                        raise
                    stack.enter_context(peers.check_removed())
                    row["note"] = peers.CHECK_REMOVED
                    o = run()
                if kind == "both":
                    row["peak_bytes"] = timing.peak_bytes(run)
                elif who == "ttr":
                    reference = o
                elif reference is not None:
                    row["difference"] = relative_difference(o, reference)
                torch.cuda.synchronize()
                ready[who], rows[who] = run, row
            except Exception as error:
                yield error_row(row, error)
                timing.check_device()
        reference = o = None  # memory for the timed calls
        while ready:
            try:
                times = timing.in_turn(ready, bench.effort)
                break
            except timing.Failed as failed:
                del ready[failed.who]
                yield error_row(rows[failed.who], failed.__cause__ or failed)
                timing.check_device()
        yield from ({**rows[who], "ms": times[who]} for who in ready)
    timing.check_device()


def _run(call: calls.Call, x: Any, upstream: Tensor, kind: str) -> Callable[[], Any]:
    if kind == "forward":
        return lambda: call(x)
    leaves = x.leaves()
    return lambda: torch.autograd.grad(call(x), leaves, upstream)


@torch.no_grad()
def decoding(bench: Bench, case: Case, shape: Shape, whos: tuple[str, ...]) -> Iterator[Row]:
    """Microseconds a token over STEPS tokens in a row: launched one by one, and replayed from one CUDA graph."""
    x = inputs(case, shape, requires_grad=False)
    assert case.declaration is not None
    W = ttr.regress(x.q, x.k, x.v, case.declaration, step=x.step, log_decay=x.log_decay, path="recurrent")[1].weights["W"]
    outputs: dict[str, Tensor] = {}
    for who in whos:
        row: Row = {"kind": "decode", "case": case.name, "shape": shape.name, "who": who}
        row["floor_us"] = 1e3 * bench.floor_ms(shape, "decode")
        try:
            step, start = calls.decode(case, who, x, W)
            outputs[who] = step(start)[0].clone()
            run = _tokens(step, start)
            run()
            row["eager_us"] = timing.eager_us(run)
            graph = timing.captured(run)
            row["graph_us"] = 1e3 * timing.median_ms(graph.replay, bench.effort) / STEPS
            if not bool(torch.isfinite(run()).all()):
                raise FloatingPointError("the output is not finite after the timed tokens")
            if who != "ttr" and "ttr" in outputs:
                row["difference"] = relative_difference(outputs[who], outputs["ttr"])
            yield row
        except Exception as error:
            yield error_row(row, error)
        timing.check_device()


def _tokens(step: calls.Step, start: Any) -> Callable[[], Tensor]:
    """STEPS tokens, each from the state that the one before left; `start` outlives the graph that reads it."""

    def run() -> Tensor:
        state = start
        for _ in range(STEPS - 1):
            _, state = step(state)
        return step(state)[0]

    return run
