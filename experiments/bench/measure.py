"""The measurements themselves: every function yields rows as they come; what raises becomes a row with its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ttr
from experiments.bench import decode, peers, timing
from experiments.bench.case import Case, Contender
from experiments.bench.linear import Linear
from experiments.bench.record import Row, with_notes
from experiments.bench.shapes import Shape, floor_bytes
from experiments.bench.timing import STEPS, Effort


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all measurements of one run share; `bandwidth` in bytes a second, `matmul` in operations a second."""

    bandwidth: float
    matmul: float
    effort: Effort

    def yardsticks(self, case: Case, shape: Shape, kind: str) -> Row:
        """What a time is held against: its floor by memory, and by operations at the rate of a large bf16 matmul."""
        found: Row = {}
        if (moved := case.floor_bytes(shape, kind)) is not None:
            found["floor_ms"] = 1e3 * moved / self.bandwidth
        if (operations := case.flops(shape, kind)) is not None:
            found |= {"flops": operations, "matmul_ms": 1e3 * operations / self.matmul}
        return found


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
    x = case.inputs(shape, requires_grad=kind == "both")
    reference = None
    if compare and kind == "forward":
        reference = case.compared("ttr", case.contender("ttr", x).call(), x)
    upstream = torch.randn_like(x.like_output)
    ready: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    with ExitStack() as stack:
        for who in whos:
            row: Row = {"kind": kind, "case": case.name, "shape": shape.name, "who": who, **bench.yardsticks(case, shape, kind)}
            notes = [case.note(who, shape)]
            try:
                contender = case.contender(who, x)
                run = _run(contender, upstream, kind)
                try:
                    o = run()
                except RuntimeError as error:
                    if not peers.refused_by_check(who, error):
                        raise
                    stack.enter_context(peers.check_removed())
                    notes.append(peers.CHECK_REMOVED)
                    o = run()
                if kind == "both":
                    if case.counts_memory(who):
                        row["peak_bytes"] = timing.peak_bytes(run)
                else:
                    if not bool(torch.isfinite(o).all()):
                        notes.append("the output is not finite")
                    compared = case.compared(who, o, x)
                    if who == "ttr":
                        reference = compared
                    elif reference is not None and compared is not None:
                        row["difference"] = relative_difference(compared, reference)
                    compared = None
                torch.cuda.synchronize()
                ready[who], rows[who] = run, with_notes(row, notes)
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


def _run(contender: Contender, upstream: Tensor, kind: str) -> Callable[[], Any]:
    if kind == "forward":
        return contender.call
    return lambda: torch.autograd.grad(contender.call(), contender.leaves, upstream)


@torch.no_grad()
def decoding(bench: Bench, case: Linear, shape: Shape, whos: tuple[str, ...]) -> Iterator[Row]:
    """Microseconds a token over STEPS tokens in a row: launched one by one, and replayed from one CUDA graph."""
    x = case.inputs(shape, requires_grad=False)
    assert case.declaration is not None
    signals: dict[str, Any] = dict(x.signals)
    W = ttr.regress(x.q, x.k, x.v, case.declaration, path="recurrent", **signals)[1].weights["W"]
    outputs: dict[str, Tensor] = {}
    for who in whos:
        row: Row = {"kind": "decode", "case": case.name, "shape": shape.name, "who": who}
        row["floor_us"] = 1e6 * floor_bytes(shape, "decode") / bench.bandwidth
        try:
            step, start = decode.decode(case, who, x, W)
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


def _tokens(step: decode.Step, start: Any) -> Callable[[], Tensor]:
    """STEPS tokens, each from the state that the one before left; `start` outlives the graph that reads it."""

    def run() -> Tensor:
        state = start
        for _ in range(STEPS - 1):
            _, state = step(state)
        return step(state)[0]

    return run
