"""The page a person reads: plain text, no colours, about a hundred columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..spec import Spec, presets
from ..spec import spec as read_spec
from .coefficients import Coefficients
from .place import Neighbour
from .recurrence import slot_letters
from .signals import legend
from .sources import short

if TYPE_CHECKING:
    from .memory import Explanation

WIDTH = 110


def page(e: Explanation) -> str:
    return "\n\n".join([title(e.spec), body(e), listed_sources(e.sources, e.bibtex)])


def body(e: Explanation) -> str:
    """The page between its title and its sources."""
    parts = [section("Recurrence", [*e.recurrence, *(["", *coefficients(e.coefficients)] if e.coefficients else [])])]
    moving = e.spec.regressor.state_shapes(e.sizes.dk, e.sizes.dv)
    learned = {n: "learned, where the memory begins" if n in moving else "learned, constant" for n in e.learned}
    where = [legend(e.spec, note) for note in e.signals] + [f"{n}: {how}, {list(e.learned[n])}" for n, how in learned.items()]
    if where:
        parts.append(section("Where the quantities come from", where))
    layer = streams(e.spec)
    if layer:
        parts.append(section("Layer around it (not part of ttr.regress)", layer))
    near = [f"near: {_short(n)}" for n in e.neighbours]
    parts.append(section("Among the published mechanisms", [*([e.place] if e.same_as else ["no preset has this mathematics"]), *near]))
    parts.append(section("Path", [f"{e.path} ({e.target}): {e.reason}"]))
    parts.append(section(f"Costs of {_layer(e)}", _costs(e)))
    return "\n\n".join(parts)


def listed_sources(keys: tuple[str, ...], bibtex: str) -> str:
    return section("Sources", [f"{short(key)}  [{key}]" for key in keys] + ["", *bibtex.splitlines()], wrap=False)


def _short(n: Neighbour) -> str:
    """A neighbour with its first differences."""
    shown = ", ".join(n.differences[:3])
    return f"{n.preset} with {shown}" + (f" and {len(n.differences) - 3} more" if len(n.differences) > 3 else "")


def title(spec: Spec) -> str:
    """The name and the five slots on one line, underlined."""
    slots = [("regressor", describe(spec, "regressor")), ("objective", describe(spec, "objective"))]
    slots += [("optimizer", describe(spec, "optimizer")), ("gate", describe(spec, "gate")), ("read", spec.read.at)]
    changed = " (changed)" if spec.name in presets() and spec != read_spec(spec.name) else ""
    return underlined(f"{spec.name or 'unnamed'}{changed}: " + " · ".join(f"{slot} {value}" for slot, value in slots if value != "-"))


def underlined(line: str) -> str:
    return f"{line}\n{'─' * min(len(line), WIDTH)}"


def describe(spec: Spec, slot: str) -> str:
    """A slot in a few words: `delta x3`, `momentum per 64`, `fixed retnet`, `vector coupled`."""
    piece = getattr(spec, slot)
    if piece is None:
        return "-"
    words = [piece.kind]
    if slot == "optimizer":
        rule = getattr(piece, "step_rule", None)
        words += [rule.kind] if rule is not None and rule.kind != "plain" else []
        mirror = getattr(piece, "mirror", None)
        words += [f"through {mirror.kind}"] if mirror is not None and not mirror.identity else []
        words += [f"x{spec.steps}"] if spec.steps > 1 else []
        words += [f"per {spec.mini_batch}"] if spec.mini_batch != 1 else []
        words += ["two keys"] if spec.separate_write_key else []
    if slot == "gate" and piece.kind != "none":
        decay = getattr(piece, "decay", None)
        words += [decay] if isinstance(decay, str) else []
        words += ["coupled"] if piece.order == "coupled" else []
    if slot == "regressor":
        window = getattr(piece, "window", None)
        words += [f"window {window}"] if window is not None else []
        words += [f"prefix {prefix}"] if (prefix := getattr(piece, "prefix", 0)) else []
        depth = getattr(piece, "depth", None)
        words += [f"depth {depth}"] if depth is not None else []
    return " ".join(words)


def section(name: str, lines: list[str], wrap: bool = True) -> str:
    out = []
    for line in lines:
        indent = " " * (2 + len(line) - len(line.lstrip()))
        wide = wrap and len(line) > WIDTH
        out += textwrap.wrap(line.strip(), WIDTH, initial_indent=indent, subsequent_indent=indent + "    ") if wide else ["  " + line]
    return "\n".join([name, *(line.rstrip() for line in out)])


def coefficients(c: Coefficients) -> list[str]:
    """A, b, c and read side by side, as matrices over the slots."""
    letters = slot_letters(c.slots)
    blocks = {"A": [list(row) for row in c.A], "b": [[x] for x in c.b]}
    if c.known is not None:
        blocks["b̃"] = [[x] for x in c.known]
    blocks |= {"c": [list(c.c)], "read": [list(c.read)]}
    r = len(c.slots)
    columns = []
    for name, rows in blocks.items():
        matrix = _matrix(rows)
        matrix += [" " * len(matrix[0])] * (r - len(matrix))
        columns.append([f"{name} = {matrix[0]}", *(" " * (len(name) + 3) + row for row in matrix[1:])])
    if c.known is not None:  # the tilde takes no column of its own
        columns = [
            [line if line.startswith("b̃") or "b̃" not in name else line[1:] for line in col]
            for name, col in zip(blocks, columns, strict=True)
        ]
    lines = ["    ".join(parts) for parts in zip(*columns, strict=True)]
    note = [] if c.symbolic else ["The optimizer's functions take no symbols: entries say which signals each number moves with."]
    return [f"Probed from the optimizer and the gate, z = ({', '.join(letters)}):", c.form, *lines, *note]


def _matrix(rows: list[list[str]]) -> list[str]:
    if len(rows) == len(rows[0]) == 1:
        return [rows[0][0]]
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return ["[ " + "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " ]" for row in rows]


def streams(spec: Spec) -> list[str]:
    """q, k: conv, silu, l2."""
    made: dict[str, list[str]] = {}
    for stream in ("q", "k", "write_key", "v", "output"):
        stages = getattr(spec.layer, stream)
        if stages:
            made.setdefault(", ".join(stage.kind for stage in stages), []).append(stream)
    return ["   ".join(f"{', '.join(names)}: {stages}" for stages, names in made.items())] if made else []


def _layer(e: Explanation) -> str:
    s = e.sizes
    heads = f"{s.heads} head{'s' if s.heads > 1 else ''} of dk = {s.dk}, dv = {s.dv}"
    if s.d_model is None:
        return f"one head of dk = {s.dk}, dv = {s.dv} (give d_model for a layer)"
    shared = f", {s.key_heads} for keys" if s.key_heads != s.heads else ""
    return f"a layer of d_model = {s.d_model}: {heads}{shared}"


def _costs(e: Explanation) -> list[str]:
    c = e.costs
    parts = ", ".join(f"{name} {size(n)}" for name, n in c.state.items())
    state = f"state per sequence: {size(c.state_bytes)} ({parts}; float32)"
    if c.bytes_per_pair:
        state += f" after T = {e.T} tokens, {c.bytes_per_pair:,} B for every pair kept"
    flops = f"FLOPs per token: {count(c.flops_per_token)}"
    if c.flops_chunk is not None:
        flops += f" one at a time, {count(c.flops_chunk)} in chunks"
    return [state, flops, f"bytes per token: {size(c.bytes_per_token)}", *(f"counted: {line}" for line in c.counted)]


def size(n: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.4g} {unit}"
    return f"{n} B"


def count(n: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return str(n)
