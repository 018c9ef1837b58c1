"""Ours against others on one CUDA GPU, linear and nonlinear memories: time, memory, decoding, first call, growth with T.

    python -m experiments.bench                                       # the default shapes, everybody who is installed
    python -m experiments.bench --cases gated_delta --only both --quick
    python -m experiments.bench --extended --cold-peers --resume
    python -m experiments.bench --cases gla kda rwkv7 deltaproduct2 momentum_delta mesa --peers fla    # decays per channel and more
    python -m experiments.bench --cases ttt_linear titans lact --extended --cold-peers     # nonlinear memories, growing sequences

Peers: fla (fla-core), flash_qla (flash-qla), torch (scaled_dot_product_attention), titans_pytorch (titans-pytorch); `--peers`
alone measures ours only.
Every figure is in measurements.jsonl as soon as it is taken: a stopped run goes on with --resume. Ends with table.md,
results.json, speed.png and growth.png in the output folder.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from experiments.bench import measure, output, peers, tables, timing
from experiments.bench.board import Board
from experiments.bench.cases import CASES
from experiments.bench.cold import cold
from experiments.bench.linear import Linear
from experiments.bench.plan import KINDS, Choice, Group, plan
from experiments.bench.record import Record, Row
from experiments.bench.shapes import SHAPES
from experiments.bench.tuning import compiled_ahead

PACKAGES = ("torch", "triton", "fla-core", "flash-qla", "tilelang", "titans-pytorch")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    which.add_argument("--extended", action="store_true", help="every case's default shapes and its others")
    made.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS), metavar="PEER")
    made.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    made.add_argument("--cold-peers", action="store_true", help="the peers' first call too, which takes minutes")
    made.add_argument("--quick", action="store_true", help="one short round of timing in place of three")
    made.add_argument("--resume", action="store_true", help="keep what the output folder has and measure the rest")
    made.add_argument("--output", type=Path, default=Path("results/bench"), help="folder, by default %(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    path = options.output / "measurements.jsonl"
    if path.exists() and not options.resume:
        parser().error(f"{path} exists; --resume goes on from it, another --output starts anew")
    if not torch.cuda.is_available():
        parser().error("no CUDA device: the kernels are measured on a GPU")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file wraps nothing

    problems = {peer: peers.problem(peer) for peer in options.peers}
    there = [peer for peer, problem in problems.items() if problem is None]
    choice = Choice(
        cases=options.cases, kinds=options.only, there=there,
        shapes=options.shapes, extended=options.extended, cold_peers=options.cold_peers,
    )  # fmt: skip
    groups, left_out = plan(choice)
    left_out = [f"{peer}: cannot be imported ({problem})" for peer, problem in problems.items() if problem] + left_out
    for line in left_out:
        console.print(f"left out: {escape(line)}", highlight=False)

    record = Record(path)
    effort = timing.QUICK if options.quick else timing.Effort()
    bench = measure.Bench(bandwidth=timing.bandwidth(effort), matmul=timing.matmul_rate(effort), effort=effort)
    record.append({
        "kind": "run", "command": shlex.join(["python", "-m", "experiments.bench", *arguments]),
        "date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "bandwidth_tb_s": bench.bandwidth / 1e12,
        "matmul_tflop_s": bench.matmul / 1e12, "versions": {name: peers.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda, "left_out": left_out,
    })  # fmt: skip
    rates = f"{bench.bandwidth / 1e12:.2f} TB/s, {bench.matmul / 1e12:.0f} TFLOP/s in bf16"
    console.print(f"{torch.cuda.get_device_name()}, {rates}", highlight=False)

    status = 0
    try:
        with compiled_ahead():
            run(bench, groups, record, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command with --resume goes on from here.")
        status = 130
    except timing.DeviceLost as error:
        console.print(f"[red]the device failed[/red]: {escape(str(error))}\nstarting again in a new process", highlight=False)
        os.execv(sys.executable, [sys.executable, "-m", "experiments.bench", *arguments, "--resume"])
    for sheet in tables.sheets(record.rows):
        console.print(tables.rich_table(sheet))
    written = output.write(options.output, record.rows)
    console.print(f"{options.output}: {', '.join(written)}", highlight=False)
    return status


def run(bench: measure.Bench, groups: Sequence[Group], record: Record, console: Console) -> None:
    """Measures what the record lacks."""
    routes = peers.Routes()
    with Board(console, len(groups)) as board:
        for group in groups:
            whos = record.missing(group.kind, group.case.name, group.shape.name, group.whos)
            board.start(f"{group.kind} {group.case.name} {group.shape.name}")
            if whos:
                for row in rows(bench, group, whos, record):
                    record.append(row)
                    board.add(row)
            for text in routes.take():
                record.append({"kind": "route", "text": text})
            board.advance()


def rows(bench: measure.Bench, group: Group, whos: tuple[str, ...], record: Record) -> Iterator[Row]:
    if group.kind == "decode":
        assert isinstance(group.case, Linear)
        return measure.decoding(bench, group.case, group.shape, whos)
    if group.kind == "cold":
        return cold_rows(group, whos)
    at = group.kind, group.case.name, group.shape.name, "ttr"
    ours = any((row["kind"], row.get("case"), row.get("shape"), row.get("who")) == at and "ms" in row for row in record.rows)
    return measure.sequence(bench, group.kind, group.case, group.shape, whos, compare=ours)


def cold_rows(group: Group, whos: tuple[str, ...]) -> Iterator[Row]:
    for who in whos:
        try:
            yield cold(group.case, group.shape, who)
        except Exception as error:
            yield measure.error_row({"kind": "cold", "case": group.case.name, "shape": group.shape.name, "who": who}, error)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is an interruption too
    sys.exit(main())
