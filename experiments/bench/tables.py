"""The rows as tables: in the terminal, and as table.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from experiments.bench.cases import CASES, WHOS
from experiments.bench.growth import growths
from experiments.bench.layers import Layer
from experiments.bench.record import Row
from experiments.bench.shapes import DECODE, SHAPES

MIB = 2**20
ORDER = {name: i for i, name in enumerate((*WHOS, *CASES, *SHAPES, *(s.name for s in DECODE)))}


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of strings; the first `names` columns are text, who the last of them, the others figures and at the end a note."""

    title: str
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]
    names: int = 3


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """One table a kind of measurement, those without a line left out."""
    layers = [row for row in rows if isinstance(CASES.get(row.get("case", "")), Layer)]
    others = [row for row in rows if row not in layers]
    made = (_sequences(others), _layers(layers), _growth(rows), _decoding(rows), _cold(rows))
    return [sheet for sheet in made if sheet.lines]


def _by_key(rows: Sequence[Row], *kinds: str) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(case, shape, who) -> {kind: row}, in the order of the declarations."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] in kinds:
            found.setdefault((row["case"], row["shape"], row["who"]), {})[row["kind"]] = row
    return dict(sorted(found.items(), key=lambda item: [ORDER[name] for name in item[0]]))


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ratio(figures: dict[tuple[str, str, str], dict[str, Row]], at: tuple[str, str, str], kind: str, field: str) -> str:
    """Ours over this one's; below 1 ours is less."""
    case, shape, who = at
    ours, its = (figures.get((case, shape, name), {}).get(kind, {}).get(field) for name in ("ttr", who))
    return "" if who == "ttr" or ours is None or not its else f"{ours / its:.2f}"


def _notes(rows: dict[str, Row]) -> str:
    notes = [f"{kind}: {row['error']}" for kind, row in rows.items() if "error" in row]
    notes += [row["note"] for row in rows.values() if "note" in row and "error" not in row]
    return "; ".join(dict.fromkeys(notes))


def _sequences(rows: Sequence[Row]) -> Sheet:
    found = _by_key(rows, "forward", "both")
    lines = []
    for at, kinds in found.items():
        cells = list(at)
        for kind in ("forward", "both"):
            row = kinds.get(kind, {})
            ms = row.get("ms")
            floor = row.get("floor_ms")
            cells += [_number(ms), "" if ms is None or floor is None else f"{ms / floor:.1f}", _ratio(found, at, kind, "ms")]
        peak = kinds.get("both", {}).get("peak_bytes")
        cells += ["" if peak is None else f"{peak / MIB:.0f}", _ratio(found, at, "both", "peak_bytes")]
        difference = kinds.get("forward", {}).get("difference")
        lines.append((*cells, "" if difference is None else f"{difference:.1e}", _notes(kinds)))
    columns = (
        "mechanism", "shape", "who", "fwd ms", "× floor", "ours / it", "fwd+bwd ms", "× floor", "ours / it", "peak MiB", "ours / it",
        "differs from ours", "note",
    )  # fmt: skip
    return Sheet(title="Sequences", columns=columns, lines=lines)


def _layers(rows: Sequence[Row]) -> Sheet:
    found = _by_key(rows, "forward", "both")
    lines = []
    for at, kinds in found.items():
        cells = list(at)
        for kind in ("forward", "both"):
            row = kinds.get(kind, {})
            cells += [_number(row.get("ms")), _ratio(found, at, kind, "ms")]
            counted = "ms" in row and "flops" in row
            cells += [f"{1e-9 * row['flops'] / row['ms']:.0f}", f"{row['matmul_ms'] / row['ms']:.2f}"] if counted else ["", ""]
        peak = kinds.get("both", {}).get("peak_bytes")
        cells += ["" if peak is None else f"{peak / MIB:.0f}", _ratio(found, at, "both", "peak_bytes")]
        lines.append((*cells, _notes(kinds)))
    columns = (
        "layer", "shape", "who", "fwd ms", "ours / it", "TFLOP/s", "of matmul", "fwd+bwd ms", "ours / it", "TFLOP/s", "of matmul",
        "peak MiB", "ours / it", "note",
    )  # fmt: skip
    return Sheet(title="Layers", columns=columns, lines=lines)


def _growth(rows: Sequence[Row]) -> Sheet:
    found = sorted(growths([row for row in rows if "shape" in row]), key=lambda g: (ORDER[g.case], g.kind != "forward", ORDER[g.who]))
    lengths = sorted({T for g in found for T in g.ns})
    lines = []
    for g in found:
        name = "fwd" if g.kind == "forward" else "fwd+bwd"
        times = [_number(g.ns.get(T), 1) for T in lengths]
        peaks = "peak KiB a token: " + ", ".join(f"{g.peak[T] / 2**10:.1f}" for T in sorted(g.peak)) if g.peak else ""
        lines.append((g.case, name, str(g.tokens), g.who, *times, f"{g.ratio:.2f}", peaks))
    columns = "mechanism", "pass", "tokens", "who", *(f"T {T}" for T in lengths), "longest / shortest", "note"
    return Sheet(title="Growth with T at as many tokens in all, ns a token", columns=columns, lines=lines, names=4)


def _decoding(rows: Sequence[Row]) -> Sheet:
    found = _by_key(rows, "decode")
    lines = []
    for at, kinds in found.items():
        row = kinds["decode"]
        cells = [*at, _number(row.get("eager_us"), 1), _ratio(found, at, "decode", "eager_us"), _number(row.get("graph_us"), 1)]
        cells += [f"{row['graph_us'] / row['floor_us']:.1f}" if "graph_us" in row else "", _ratio(found, at, "decode", "graph_us")]
        lines.append((*cells, f"{row['difference']:.1e}" if "difference" in row else "", _notes(kinds)))
    columns = (
        "mechanism", "batch", "who", "eager µs", "ours / it", "CUDA graph µs", "× floor", "ours / it", "differs from ours", "note"
    )  # fmt: skip
    return Sheet(title="Decoding, µs a token (32 heads, D 128, float32 state)", columns=columns, lines=lines)


def _cold(rows: Sequence[Row]) -> Sheet:
    found = _by_key(rows, "cold")
    lines = []
    for at, kinds in found.items():
        row = kinds["cold"]
        figures = _number(row.get("first_s"), 1), _ratio(found, at, "cold", "first_s"), _number(row.get("second_ms"), 1)
        lines.append((*at, *figures, _notes(kinds)))
    columns = ("mechanism", "shape", "who", "first call s", "ours / it", "second call ms", "note")
    return Sheet(title="First call, forward and backward, empty caches", columns=columns, lines=lines)


def markdown(sheet: Sheet) -> str:
    figures = len(sheet.columns) - sheet.names - 1
    rule = ["---"] * sheet.names + ["--:"] * figures + ["---"]
    lines = [sheet.columns, rule, *sheet.lines]
    return f"### {sheet.title}\n\n" + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def rich_table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    for i, column in enumerate(sheet.columns):
        note = i == len(sheet.columns) - 1
        table.add_column(column, justify="left" if i < sheet.names or note else "right", overflow="fold")
    for line in sheet.lines:
        table.add_row(*(escape(cell) for cell in line), style="bold" if line[sheet.names - 1] == "ttr" else None)
    return table
