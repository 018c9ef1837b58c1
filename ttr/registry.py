"""Registries: every slot of a declaration is a table of frozen dataclasses keyed by `kind`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class SpecError(ValueError):
    """A declaration that cannot be read or has no meaning; the message names the full key and the choices."""


def choose_from(got: object, choices: Iterable[str]) -> str:
    """`[choices].`, with a suggestion when one is close to what was got, in whatever case."""
    choices = sorted(choices)
    by_lower = {name.lower(): name for name in choices}
    close = difflib.get_close_matches(str(got).lower(), by_lower, n=1)
    return f"{choices}." + (f" Did you mean {by_lower[close[0]]!r}?" if close else "")


def unknown(what: str, got: object, choices: Iterable[str]) -> SpecError:
    """The error for a name that is not one of `choices`."""
    choices = list(choices)
    if not choices:
        return SpecError(f"{what}={got!r} is not known; there is none here")
    return SpecError(f"{what}={got!r} is not known; choose from {choose_from(got, choices)}")


class Registry(Generic[T]):
    """A table `kind -> class`, filled by decorator and, only when an unknown kind is named, by entry points."""

    def __init__(self, slot: str, group: str):
        self.slot = slot
        self.group = group
        self._classes: dict[str, type[T]] = {}
        self._aliases: dict[str, tuple[str, dict]] = {}

    def register(self, kind: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter a frozen dataclass under `kind`."""

        def enter(cls: type[T]) -> type[T]:
            params = getattr(cls, "__dataclass_params__", None)
            named = getattr(cls, "__name__", repr(cls))
            own = isinstance(cls, type) and "__dataclass_params__" in vars(cls)  # a base's would leave out the class's own fields
            if not own or not is_dataclass(cls) or params is None or not params.frozen:
                raise SpecError(f"{self.slot} kind {kind!r}: {named} must be a @dataclass(frozen=True, kw_only=True)")
            if getattr(cls, "registry", None) is not self:
                raise SpecError(f"{self.slot} kind {kind!r}: {named} must derive from the base class of this slot")
            if kind in self._aliases or self._classes.get(kind, cls).__qualname__ != cls.__qualname__:
                raise SpecError(f"{self.slot} kind {kind!r} is registered already")
            cls.kind = kind  # type: ignore[attr-defined]
            self._classes[kind] = cls
            return cls

        return enter

    def alias(self, spelling: str, kind: str, **fields) -> None:
        """Accept `spelling` as `kind` with these fields preset (equivalent declarations become one Spec)."""
        self._aliases[spelling] = (kind, fields)

    def expand(self, kind: str) -> tuple[str, dict]:
        """The registered kind and the preset fields behind a spelling."""
        return self._aliases.get(kind, (kind, {}))

    def kinds(self) -> list[str]:
        return sorted([*self._classes, *self._aliases])

    def get(self, kind: str, key: str | None = None) -> type[T]:
        """The class of `kind`; `key` is the full key the user wrote, for the error."""
        kind, _ = self.expand(kind)
        if kind not in self._classes:
            self._load(kind, key or self.slot)
        return self._classes[kind]

    def _load(self, kind: str, key: str) -> None:
        """Enter what an installed package offers as `kind`: that entry point alone, so that no other can break it."""
        offered = {entry.name: entry for entry in entry_points(group=self.group)}
        if kind not in offered:
            raise unknown(f"{key}.kind", kind, {*self.kinds(), *offered})
        try:
            cls = offered[kind].load()
        except Exception as error:
            raise SpecError(f"{key}.kind={kind!r}: {offered[kind].value!r}, which offers it, cannot be imported: {error!r}") from error
        self.register(kind)(cls)

    def holds(self, piece: object) -> bool:
        """Whether `piece` is an instance of a registered class (or of an earlier definition of it, as notebooks make)."""
        cls = self._classes.get(getattr(piece, "kind", ""))
        return cls is not None and cls.__qualname__ == type(piece).__qualname__


REGRESSORS: Registry = Registry("regressor", "ttr.regressors")
OBJECTIVES: Registry = Registry("objective", "ttr.objectives")
OPTIMIZERS: Registry = Registry("optimizer", "ttr.inner_optim")
STEP_RULES: Registry = Registry("optimizer.step_rule", "ttr.step_rules")
MIRRORS: Registry = Registry("optimizer.mirror", "ttr.mirrors")
GATES: Registry = Registry("gate", "ttr.gates")
STAGES: Registry = Registry("stage", "ttr.stages")
SIGNAL_MAPS: Registry = Registry("map", "ttr.signal_maps")
COMPOSITIONS: Registry = Registry("compose", "ttr.compositions")

SLOTS = {"regressor": REGRESSORS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS, "gate": GATES}

regressor = REGRESSORS.register
objective = OBJECTIVES.register
optimizer = OPTIMIZERS.register
step_rule = STEP_RULES.register
mirror = MIRRORS.register
gate = GATES.register
stage = STAGES.register
signal_map = SIGNAL_MAPS.register
composition = COMPOSITIONS.register
