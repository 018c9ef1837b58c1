"""What can be written under a kind: what it does, its fields, what each takes and what it holds when left out."""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from ..registry import (
    COMPOSITIONS,
    GATES,
    MIRRORS,
    OBJECTIVES,
    OPTIMIZERS,
    REGRESSORS,
    SIGNAL_MAPS,
    STAGES,
    STEP_RULES,
    Registry,
    SpecError,
    unknown,
)
from ..schema import default_of, dump, hints
from ..signals import Signal
from ..sources import compositions, presets
from .text import WIDTH

REGISTRIES: dict[str, Registry] = {
    "regressor": REGRESSORS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS, "optimizer.step_rule": STEP_RULES,
    "optimizer.mirror": MIRRORS, "gate": GATES, "a signal's map": SIGNAL_MAPS, "a layer's stages": STAGES, "compose": COMPOSITIONS,
}  # fmt: skip
WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null", Any: "a preset or a declaration",
}  # fmt: skip


def of_kind(kind: str) -> str:
    """Every slot that knows `kind`: its docstring and a table of its fields; of a slot, its kinds. Raises SpecError for what is neither."""
    found = []
    if kind in REGISTRIES:
        found = ["\n".join(textwrap.wrap(f"{kind}: one of {', '.join(REGISTRIES[kind].kinds())} (what one takes: list KIND)", WIDTH))]
    known = {slot: registry for slot, registry in REGISTRIES.items() if kind in registry.kinds()}
    if not known and not found and kind in (*presets(), *compositions()):
        raise SpecError(f"kind={kind!r} is a whole declaration that comes with ttr: python -m ttr explain {kind}")
    if not known and not found:
        raise unknown("kind", kind, {*REGISTRIES, *(name for registry in REGISTRIES.values() for name in registry.kinds())})
    return "\n\n".join([*found, *(_section(slot, registry, kind) for slot, registry in known.items())])


def _section(slot: str, registry: Registry, kind: str) -> str:
    own, preset = registry.expand(kind)
    cls = registry.get(kind)
    settings = ", ".join(f"{name} {written(value)}" for name, value in preset.items())
    title = f"{slot} {kind}" + (f": {own} with {settings}" if preset or own != kind else "")
    doc = inspect.cleandoc(cls.__doc__ or "")
    parts = [title, "─" * len(title), *([] if doc.startswith(f"{cls.__name__}(") else [doc, ""])]
    rows = [(name, preset.get(name, default), takes) for name, default, takes in _fields(cls)]
    table = [("field", "default", "takes"), *((name, written(default), takes) for name, default, takes in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    lines = [f"{name.ljust(widths[0])}  {default.ljust(widths[1])}  {takes}" for name, default, takes in table]
    parts += lines if rows else ["It has no fields."]
    for base in cls.__mro__[1:]:
        if is_dataclass(base) and base.__doc__ and hints(cls).keys() & vars(base).get("__annotations__", {}).keys():
            paragraphs = inspect.cleandoc(base.__doc__).split("\n\n")
            parts += ["", f"Every {base.__name__.lower()}:", *(line for text in paragraphs for line in textwrap.wrap(text, WIDTH))]
    if any("a signal" in takes for *_, takes in rows):
        fields = [f"{name} ({takes})" for name, _, takes in _fields(Signal)]
        signal = f"A signal is a number, a map ({', '.join(SIGNAL_MAPS.kinds())}), or a mapping of: {', '.join(fields)}."
        parts += ["", *textwrap.wrap(signal, WIDTH)]
    return "\n".join(parts)


def _fields(cls: type) -> list[tuple[str, Any, str]]:
    """Name, default as plain data (MISSING where there is none) and what it takes; an inline signal's fields stand as its own."""
    found, inline = [], getattr(cls, "inline_signal", None)
    for name, hint in hints(cls).items():
        default = default_of(cls, name)
        if name == inline:
            base = default if isinstance(default, Signal) else Signal()
            found += [(n, dump(getattr(base, n)), takes(h)) for n, h in hints(Signal).items()]
        else:
            found.append((name, default if default is MISSING else dump(default), takes(hint)))
    return found


def takes(hint: Any) -> str:
    """A field's type in the words of the error messages."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Signal:
        return "a signal"
    if hint in WORDS:
        return WORDS[hint]
    registry = getattr(hint, "registry", None)
    if registry is not None:
        return f"one of {', '.join(registry.kinds())}"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(written(x) for x in args)
    if origin in (Union, types.UnionType):
        return " or ".join(takes(arg) for arg in args)
    if origin is tuple:
        return f"a list, each {takes(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)}: {', '.join(map(takes, args))}"
    if is_dataclass(hint):
        shorthand = getattr(hint, "shorthand", None)
        mapping = f"a mapping of {', '.join(f'{name} ({what})' for name, _, what in _fields(hint))}"  # type: ignore[arg-type]
        return f"{takes(hints(hint)[shorthand])}, or {mapping}" if shorthand else mapping  # type: ignore[arg-type]
    raise TypeError(f"no words for fields of type {hint!r}")


def written(value: Any) -> str:
    """Plain data as YAML has it on one line."""
    if value is MISSING:
        return "(needed)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {written(x)}' for name, x in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
