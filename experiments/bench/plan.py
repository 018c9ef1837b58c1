"""What will be measured, the figures that matter most first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.bench import decode, peers
from experiments.bench.case import Case
from experiments.bench.cases import CASES
from experiments.bench.shapes import DECODE, SHAPES, Shape

KINDS = ("forward", "both", "decode", "cold")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Measurements that are taken in turn: one kind, mechanism and shape, everybody who runs it."""

    kind: str
    case: Case
    shape: Shape
    whos: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the command line asks for. shapes: None for every case's own. there: the peers that were chosen and can be imported."""

    cases: Sequence[str]
    kinds: Sequence[str]
    there: Sequence[str]
    shapes: Sequence[str] | None = None
    extended: bool = False
    cold_peers: bool = False

    def shapes_of(self, case: Case) -> list[Shape]:
        """A case has shapes of its own; those that were asked for."""
        if self.shapes is None:
            return [*case.shapes, *(case.more if self.extended else ())]
        return [shape for shape in (*case.shapes, *case.more) if shape.name in self.shapes]


def plan(choice: Choice) -> tuple[list[Group], list[str]]:
    """The groups in their order, and a line for every contender that is left out of a shape with its reason."""
    cases = [CASES[name] for name in choice.cases]
    ours = [case for case in cases if "ttr" in case.who]
    yardsticks = [case for case in cases if "ttr" not in case.who]
    left_out: dict[str, None] = {}

    def group(kind: str, case: Case, shape: Shape, whos: Sequence[str]) -> Iterator[Group]:
        kept = []
        for who in whos:
            if (peer := peers.peer_of(who)) != "ttr" and peer not in choice.there:
                continue
            reason = peers.declines(who, case, shape)
            if reason is None:
                kept.append(who)
            else:
                left_out[f"{who} {case.name} {shape.name}: {reason}"] = None
        if kind in choice.kinds and kept:
            yield Group(kind=kind, case=case, shape=shape, whos=tuple(kept))

    def sequences(mechanisms: Sequence[Case], default: bool) -> Iterator[Group]:
        for shape in SHAPES.values():
            for case in mechanisms:
                if shape in choice.shapes_of(case) and (shape in case.shapes) == default:
                    for kind in ("forward", "both"):
                        yield from group(kind, case, shape, case.who)

    def all_of_them() -> Iterator[Group]:
        yield from sequences(ours, default=True)
        for case in ours:
            for shape in DECODE if choice.shapes_of(case) else ():
                yield from group("decode", case, shape, decode.decoders(case))
        yield from sequences(yardsticks, default=True)
        yield from sequences(cases, default=False)
        for case in ours:
            for shape in choice.shapes_of(case)[:1]:
                for who in case.who if choice.cold_peers else ("ttr",):
                    yield from group("cold", case, shape, (who,))

    for case in cases:
        if not choice.shapes_of(case):
            left_out[f"{case.name}: has {', '.join(shape.name for shape in (*case.shapes, *case.more))}"] = None
    return list(all_of_them()), list(left_out)
