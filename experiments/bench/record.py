"""What was measured, one JSON line each, written at once: a stopped run loses the measurement under way and no more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def with_notes(row: Row, notes: Iterable[str]) -> Row:
    """The row and its note, where one of `notes` says something."""
    text = "; ".join(note for note in notes if note)
    return {**row, "note": text} if text else row


class Record:
    """The rows of a JSON-lines file; a measurement has kind, case, shape and who, and either figures or `error`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # stopped while it wrote
            path.write_text(whole)
        self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]

    def append(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def missing(self, kind: str, case: str, shape: str, whos: Iterable[str]) -> tuple[str, ...]:
        """Those of `whos` whose measurement is not there yet; one that raised counts as measured."""
        there = {row["who"] for row in self.rows if (row["kind"], row.get("case"), row.get("shape")) == (kind, case, shape)}
        return tuple(who for who in whos if who not in there)
