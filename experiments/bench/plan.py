"""What will be measured, the figures that matter most first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.bench import calls, peers
from experiments.bench.cases import CASES, Case
from experiments.bench.shapes import DECODE, DEFAULT, SHAPES, Shape

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
    """What the command line asks for. `there`: the peers that were chosen and can be imported."""

    cases: Sequence[str]
    shapes: Sequence[str]
    kinds: Sequence[str]
    there: Sequence[str]
    cold_peers: bool = False


def plan(choice: Choice) -> tuple[list[Group], list[str]]:
    """The groups in their order, and a line for every contender that is left out of a shape with its reason."""
    shapes = [SHAPES[name] for name in choice.shapes]
    cases = [CASES[name] for name in choice.cases]
    ours = [case for case in cases if case.declaration is not None]
    yardsticks = [case for case in cases if case.declaration is None]
    default = [shape for shape in shapes if shape in DEFAULT]
    left_out: dict[str, None] = {}

    def group(kind: str, case: Case, shape: Shape, whos: Sequence[str]) -> Iterator[Group]:
        kept = []
        for who in whos:
            if who != "ttr" and who not in choice.there:
                continue
            reason = peers.declines(who, case, shape)
            if reason is None:
                kept.append(who)
            else:
                left_out[f"{who} {case.name} {shape.name}: {reason}"] = None
        if kind in choice.kinds and kept:
            yield Group(kind=kind, case=case, shape=shape, whos=tuple(kept))

    def sequences(some: Sequence[Shape], mechanisms: Sequence[Case]) -> Iterator[Group]:
        for shape in some:
            for case in mechanisms:
                for kind in ("forward", "both"):
                    yield from group(kind, case, shape, case.who)

    def all_of_them() -> Iterator[Group]:
        yield from sequences(default, ours)
        for case in ours:
            for shape in DECODE:
                yield from group("decode", case, shape, calls.decoders(case))
        yield from sequences(default, yardsticks)
        yield from sequences([shape for shape in shapes if shape not in DEFAULT], cases)
        for case in ours:
            for who in case.who if choice.cold_peers else ("ttr",):
                yield from group("cold", case, shapes[0], (who,))

    return list(all_of_them()), list(left_out)
