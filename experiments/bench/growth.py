"""Time and memory a token as sequences grow at as many tokens in all: flat where the work is linear and the GPU stays filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.bench.record import Row
from experiments.bench.shapes import SHAPES

LENGTHS = 3  # fewer lengths say nothing of a growth


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Of one contender: {T: nanoseconds a token}, all at `tokens` in one call; peak: {T: bytes a token}, of `both`."""

    case: str
    who: str
    kind: str
    tokens: int
    ns: dict[int, float]
    peak: dict[int, float]

    @property
    def ratio(self) -> float:
        """The longest sequence's time over the shortest's."""
        return self.ns[max(self.ns)] / self.ns[min(self.ns)]


def growths(rows: Sequence[Row]) -> list[Growth]:
    """Every contender that was timed at LENGTHS lengths with the same heads and as many tokens in all."""
    found: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        if row["kind"] in ("forward", "both") and "ms" in row:
            shape = SHAPES[row["shape"]]
            at = row["case"], row["who"], row["kind"], shape.B * shape.T, (shape.H, shape.Hv, shape.dk, shape.dv)
            found.setdefault(at, {})[shape.T] = row
    made = []
    for (case, who, kind, tokens, _), by_length in found.items():
        if len(by_length) >= LENGTHS:
            ns = {T: 1e6 * by_length[T]["ms"] / tokens for T in sorted(by_length)}
            peak = {T: by_length[T]["peak_bytes"] / tokens for T in ns if "peak_bytes" in by_length[T]}
            made.append(Growth(case=case, who=who, kind=kind, tokens=tokens, ns=ns, peak=peak))
    return made
