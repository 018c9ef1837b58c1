"""Reading and writing declarations: mapping <-> frozen dataclasses, directed by their type hints.

Every error names the full key, the value that came, what was expected and the choices.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from .registry import SIGNAL_MAPS, Registry, SpecError, choose_from
from .signals import Signal


@cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved type hints of a dataclass's init fields."""
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in fields(cls) if f.init}


@cache
def default_of(cls: type, name: str) -> Any:
    """The default of a dataclass field, or MISSING; pieces are frozen, so one serves all."""
    for f in fields(cls):
        if f.name == name:
            return f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else MISSING
    return MISSING


def parse_kind(registry: Registry, value: Any, key: str) -> Any:
    """A slot's value (bare word, mapping with `kind`, or an instance) -> the registered dataclass."""
    if is_dataclass(value) and not isinstance(value, type):
        if not registry.holds(value):
            raise SpecError(f"{key}={value!r}: {type(value).__name__} is not a registered {registry.slot}; choose from {registry.kinds()}")
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if value is None:
        value = {"kind": "none"}
    if not isinstance(value, Mapping):
        raise SpecError(f"{key}={value!r}: expected a kind (one of {registry.kinds()}) or a mapping with `kind`")
    if "kind" not in value:
        raise SpecError(f"{key} has no `kind`; choose from {registry.kinds()}")
    if not isinstance(value["kind"], str):
        raise SpecError(f"{key}.kind={value['kind']!r} is not a word; choose from {registry.kinds()}")
    _, preset = registry.expand(value["kind"])
    cls = registry.get(value["kind"], key)
    body = {**preset, **{k: v for k, v in value.items() if k != "kind"}}
    for name in preset.keys() & value.keys():
        given = value[name]
        if name == "step_rule":
            word = given.get("kind", preset[name]) if isinstance(given, Mapping) else getattr(given, "kind", given)
            if word != preset[name]:
                raise SpecError(f"{key}: kind {value['kind']!r} means step_rule {preset[name]!r}, got step_rule={word!r}")
            body[name] = {"kind": word, **given} if isinstance(given, Mapping) else given
        elif isinstance(given, Mapping) and not {"map", "value"} & given.keys():
            body[name] = {"map": preset[name], **given}  # `implicit` with `step: {bias: 0}` keeps its softplus
    return parse_fields(cls, body, key)


def parse_fields(cls: type, body: Mapping, key: str) -> Any:
    """A mapping of fields -> an instance of `cls`; a class with `inline_signal` takes that signal's fields as its own."""
    known = hints(cls)
    inline = getattr(cls, "inline_signal", None)
    body = dict(body)
    if inline is not None and inline not in body:
        own = set(known)
        part = {name: body.pop(name) for name in list(body) if name not in own and name in hints(Signal)}
        if part:
            body[inline] = part
    for name, value in body.items():
        if name not in known:
            raise no_field(f"{key}.{name}", value, cls, (set(known) | (set(hints(Signal)) if inline else set())) - {inline})
    values = {n: parse(known[n], v, f"{key}.{n}" if n != inline else key, default_of(cls, n)) for n, v in body.items()}
    missing = [n for n in known if n not in values and default_of(cls, n) is MISSING]
    if missing:
        raise SpecError(f"{key}: {cls.__name__} needs {missing}")
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(str(error) if key in str(error) else f"{key}: {error}") from None


def no_field(key: str, value: Any, cls: type, names: set[str]) -> SpecError:
    if not names:
        return SpecError(f"{key}={value!r}: {cls.__name__} has no such field; it has none")
    return SpecError(f"{key}={value!r}: {cls.__name__} has no such field; choose from {choose_from(key.rsplit('.', 1)[-1], names)}")


def parse_signal(value: Any, key: str, default: Any) -> Signal:
    """A number, a map name or a mapping -> Signal; what a mapping leaves out is taken from the field's default."""
    if isinstance(value, Signal):
        return value
    base = default if isinstance(default, Signal) else Signal()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isnan(value):
            raise SpecError(f"{key}={value!r}: expected a number")
        return Signal(value=float(value))
    body = {"map": value} if isinstance(value, str) else value
    if not isinstance(body, Mapping):
        raise SpecError(f"{key}={value!r}: a signal is a number, a map name ({SIGNAL_MAPS.kinds()}) or a mapping")
    body = dict(body)
    merged = {name: getattr(base, name) for name in hints(Signal) if name != "value"}
    if body.get("value") is not None:
        if set(body) - {"value", "per"}:
            extra = sorted(set(body) - {"value", "per"})
            raise SpecError(f"{key}: a constant (value={body['value']!r}) takes no other fields, got {extra}")
        return Signal(**{n: parse(hints(Signal)[n], v, f"{key}.{n}") for n, v in body.items()})
    if "map" in body:
        given = body["map"]
        if isinstance(given, Mapping) and "kind" not in given:
            given = {**dump(base.map, full=True), **given}
        body["map"] = parse_kind(SIGNAL_MAPS, given, f"{key}.map")
    for name, item in body.items():
        if name not in hints(Signal):
            raise no_field(f"{key}.{name}", item, Signal, set(hints(Signal)))
        merged[name] = item if name == "map" else parse(hints(Signal)[name], item, f"{key}.{name}", MISSING)
    try:
        return Signal(**merged)
    except SpecError as error:
        raise SpecError(f"{key}.{error}") from None


def parse(hint: Any, value: Any, key: str, default: Any = MISSING) -> Any:
    """`value` read as the type `hint`; refuses instead of converting when information would be lost."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is Signal:
        return parse_signal(value, key, default)
    registry = getattr(hint, "registry", None)
    if registry is not None:
        return parse_kind(registry, value, key)
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            raise SpecError(f"{key}={value!r}: expected one of {choose_from(value, (str(a) for a in args))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for arg in args:
            if arg is type(None):
                continue
            try:
                return parse(arg, value, key, default)
            except SpecError as error:
                errors.append(str(error))
        prefix = f"{key}={value!r}: "
        raise SpecError(errors[0] if len(errors) == 1 else prefix + "; or ".join(e.removeprefix(prefix).rstrip(".") for e in errors))
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise SpecError(f"{key}={value!r}: expected a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(parse(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise SpecError(f"{key}={value!r}: expected {len(args)} entries, got {len(value)}")
        return tuple(parse(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        shorthand = getattr(hint, "shorthand", None)
        if shorthand and not isinstance(value, Mapping):
            value = {shorthand: value}
        if not isinstance(value, Mapping):
            raise SpecError(f"{key}={value!r}: expected a mapping with {sorted(hints(typing.cast(type, hint)))}")
        return parse_fields(typing.cast(type, hint), value, key)
    if hint is bool or hint is str:
        if not isinstance(value, hint):
            raise SpecError(f"{key}={value!r}: expected {'true or false' if hint is bool else 'a word'}, got {type(value).__name__}")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise SpecError(f"{key}={value!r}: expected a whole number, got {type(value).__name__}")
        return value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SpecError(f"{key}={value!r}: expected a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise SpecError(f"{key}={value!r}: expected a finite number")
        if math.isnan(value):
            raise SpecError(f"{key}={value!r}: expected a number")
        return float(value)
    raise SpecError(f"{key}: ttr cannot read fields of type {hint!r}")


def dump(value: Any, full: bool = False, default: Any = None) -> Any:
    """The plain-data form of a piece; `full` also writes fields that hold their default.

    default: what a signal's field holds when nothing is declared, from which `parse_signal` fills the gaps.
    """
    if isinstance(value, Signal):
        if value.constant:
            return value.value if value.per == "head" else {"value": value.value, "per": value.per}
        base = default if isinstance(default, Signal) else Signal()
        body: dict[str, Any] = {"map": dump(value.map, full)}
        body |= {
            n: dump(getattr(value, n), full)
            for n in hints(Signal)
            if n not in ("map", "value") and (full or getattr(value, n) != getattr(base, n))
        }
        return body["map"] if list(body) == ["map"] and isinstance(body["map"], str) else body
    if is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        inline = getattr(cls, "inline_signal", None)
        body = {}
        if hasattr(cls, "kind"):
            body["kind"] = cls.kind  # type: ignore[attr-defined]
        for name in hints(cls):
            item = getattr(value, name)
            if not full and item == default_of(cls, name):
                continue
            data = dump(item, full, default_of(cls, name))
            if name == inline:
                body |= data if isinstance(data, Mapping) else {"map" if isinstance(data, str) else "value": data}
            else:
                body[name] = data
        if not full and hasattr(cls, "kind") and list(body) == ["kind"]:
            return body["kind"]
        shorthand = getattr(cls, "shorthand", None)
        if not full and shorthand and list(body) == [shorthand]:
            return body[shorthand]
        return body
    if isinstance(value, tuple):
        return [dump(v, full) for v in value]
    return value
