"""What is shown while measurements come in: a growing table and a bar; plain lines where the output is not a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.bench.record import Row

SHOWN = 24  # a taller table would not fit the terminal


class Board:
    """Use as a context manager around the measurements."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.rows: list[Row] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.bar = self.progress.add_task("", total=total)
        self.live = Live(self, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def __rich__(self) -> Group:
        table = Table("", "mechanism", "shape", "who", "measured")
        for row in self.rows[-SHOWN:]:
            table.add_row(row["kind"], row["case"], row["shape"], row["who"], escape(measured(row)))
        return Group(table, self.progress)

    def start(self, what: str) -> None:
        self.progress.update(self.bar, description=what)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.live is None:
            self.console.print(*(row[name] for name in ("kind", "case", "shape", "who")), escape(measured(row)), highlight=False)

    def advance(self) -> None:
        self.progress.advance(self.bar)


def measured(row: Row) -> str:
    """The figures of one row in words."""
    if "error" in row:
        return row["error"]
    parts = []
    if "ms" in row:
        parts.append(f"{row['ms']:.3f} ms")
    if "ms" in row and "floor_ms" in row:
        parts.append(f"{row['ms'] / row['floor_ms']:.1f} × floor")
    if "ms" in row and "flops" in row:
        parts.append(f"{1e-9 * row['flops'] / row['ms']:.0f} TFLOP/s, {row['matmul_ms'] / row['ms']:.2f} of torch.matmul")
    if "peak_bytes" in row:
        parts.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
    if "graph_us" in row:
        parts.append(f"{row['eager_us']:.1f} µs eager, {row['graph_us']:.1f} µs in a CUDA graph")
    if "first_s" in row:
        parts.append(f"first call {row['first_s']:.1f} s, second {row['second_ms']:.1f} ms")
    if "difference" in row:
        parts.append(f"differs from ours by {row['difference']:.1e}")
    return ", ".join([*parts, *([row["note"]] if "note" in row else [])])
