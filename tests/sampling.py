"""Random declarations as plain data, directed by the type hints of the registered pieces themselves."""

from __future__ import annotations

import random
import types
from typing import Any, Literal, Union, get_args, get_origin

import ttr
from ttr.registry import GATES, OBJECTIVES, OPTIMIZERS, REGRESSORS, SIGNAL_MAPS, STAGES, Registry
from ttr.schema import hints
from ttr.signals import Signal
from ttr.spec import Layer, Read

NUMBERS = (1e-3, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


def kinds(registry: Registry) -> list[str]:
    """What a declaration can name without third parties, whose tests may have registered some in this process."""
    return [kind for kind in registry.kinds() if registry.get(kind).__module__.startswith("ttr.")]


class Sampler:
    """`rate`: how often a field is written out instead of left at its default."""

    def __init__(self, seed: int, rate: float = 0.2):
        self.random = random.Random(seed)
        self.rate = rate

    def spec(self) -> ttr.Spec:
        """The Spec of a random declaration of a random regressor; draws until its pieces have a meaning together."""
        regressor = self.random.choice(kinds(REGRESSORS))
        while True:
            try:
                return ttr.spec(self.declaration(regressor))
            except ttr.SpecError:
                continue

    def declaration(self, regressor: str) -> dict[str, Any]:
        body: dict[str, Any] = {"regressor": self.piece(REGRESSORS, regressor)}
        if regressor != "kernel":
            solvers = ("cg", "cholesky", "rls")
            fit = [k for k in kinds(OPTIMIZERS) if (k in solvers) == (regressor == "least_squares")]
            body["optimizer"] = self.piece(OPTIMIZERS, self.random.choice(fit))
            if self.random.random() < 0.5 or regressor == "mlp":
                body["objective"] = self.piece(OBJECTIVES)
            body["gate"] = self.piece(GATES)
            body["read"] = self.fields(Read)
        body["layer"] = self.fields(Layer)
        return body

    def piece(self, registry: Registry, kind: str | None = None) -> Any:
        kind = kind or self.random.choice(kinds(registry))
        body = {"kind": kind, **self.fields(registry.get(kind))}
        return kind if list(body) == ["kind"] else body

    def fields(self, cls: type) -> dict[str, Any]:
        names = hints(cls)
        inline = getattr(cls, "inline_signal", None)
        body = {n: self.value(names[n]) for n in names if n != inline and self.random.random() < self.rate}
        return body if inline is None else {**body, **self.signal()}

    def signal(self) -> dict[str, Any]:
        if self.random.random() < 0.2:
            return {"value": -self.random.choice(NUMBERS)}
        names = [n for n in hints(Signal) if n not in ("value", "tie")]
        return {n: self.value(hints(Signal)[n]) for n in names if self.random.random() < self.rate}

    def value(self, hint: Any) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if hint is Signal:
            spelling = self.random.choice(("number", "word", "mapping"))
            if spelling == "number":
                return self.random.choice(NUMBERS)
            return self.random.choice(kinds(SIGNAL_MAPS)) if spelling == "word" else self.signal()
        if getattr(hint, "registry", None) is not None:
            return self.piece(hint.registry)
        if origin is Literal:
            return self.random.choice(args)
        if origin in (Union, types.UnionType):
            choice = self.random.choice(args)
            return None if choice is type(None) else self.value(choice)
        if origin is tuple:
            if args[1] is not Ellipsis:
                return sorted(self.random.choice(NUMBERS) for _ in args)
            return [self.value(args[0]) for _ in range(self.random.randrange(4))]
        return self.random.choice({bool: (True, False), int: (1, 2, 3, 16), float: NUMBERS, str: ("step",)}[hint])


def every_kind() -> set[tuple[str, str]]:
    """(slot, kind) of every piece that a declaration can name; spellings count as what they mean."""
    registries = (REGRESSORS, OBJECTIVES, OPTIMIZERS, GATES, STAGES)
    return {(r.slot, r.expand(kind)[0]) for r in registries for kind in kinds(r)}
