"""Where a declaration comes from: a preset's name, a YAML file or a mapping, what it is based on, what overrides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .registry import SIGNAL_MAPS, SLOTS, SpecError, choose_from, unknown
from .schema import dump

KEYS = ("name", "base", *SLOTS, "read", "layer")  # of one memory
COMPOSED_KEYS = ("name", "base", "compose")  # of a composition
PARTS = ("memory", "window", "attention")  # fields of `compose` that are declarations themselves


@runtime_checkable
class Declared(Protocol):
    """A Spec, seen from the module that it reads itself with."""

    def to_dict(self) -> dict[str, Any]: ...


def presets() -> list[str]:
    """The names of the declarations that come with ttr; each is a YAML file in ttr/presets."""
    return _names("presets")


def compositions() -> list[str]:
    """The names of the compositions of layers that come with ttr; each is a YAML file in ttr/presets/compositions."""
    return _names("presets", "compositions")


def _names(*folder: str) -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("ttr").joinpath(*folder).iterdir() if p.name.endswith(".yaml"))


def read(source: Any, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plain mapping behind a source, with overrides by slot or dotted key on top."""
    return merge(mapping_of(source), mapping_of(nest(overrides or {})), "")


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *path, last = key.split(".")
        inner = {last: value}
        for part in reversed(path):
            inner = {part: inner}
        out = merge(out, inner, "")
    return out


def mapping_of(source: Any, key: str = "spec", seen: tuple[str, ...] = (), folder: Path | None = None) -> dict[str, Any]:
    """The raw mapping behind a source, its `base` merged in, `qk` spelled out.

    key: what names the source, `spec` or `base`. seen: the sources that lead here. folder: of the file it was named in.
    """
    if isinstance(source, Declared):
        return source.to_dict()
    if isinstance(source, (str, Path)):
        where = _locate(str(source), key, folder)
        if str(where) in seen:
            raise SpecError(f"{key}={str(source)!r} leads back to itself through {list(seen)}")
        seen, source = (*seen, str(where)), _read_yaml(where, key)
        folder = where.parent if isinstance(where, Path) else None
    if not isinstance(source, Mapping):
        raise SpecError(f"{key}={source!r}: expected a preset name, a YAML path, a mapping or a Spec, got {type(source).__name__}")
    body = {str(k): v for k, v in source.items()}
    for name, value in body.items():
        if name not in KEYS and name not in COMPOSED_KEYS:
            choices = choose_from(name, KEYS)
            raise SpecError(f"{name}={value!r}: a declaration has no such key; choose from {choices}")
    if isinstance(body.get("compose"), Mapping):
        body["compose"] = {n: _anchored(v, folder) if n in PARTS else v for n, v in body["compose"].items()}
    if isinstance(body.get("layer"), Mapping) and "qk" in body["layer"]:
        layer = dict(body["layer"])
        both = layer.pop("qk")
        clash = [s for s in ("q", "k") if s in layer]
        if clash:
            raise SpecError(f"layer.qk sets q and k, but layer.{clash[0]} is given too")
        body["layer"] = {**layer, "q": both, "k": both}
    base = body.pop("base", None)
    if base is None:
        return body
    merged = merge(mapping_of(base, "base", seen, folder), body, "")
    if "name" not in body:
        merged.pop("name", None)
    return merged


def _anchored(part: Any, folder: Path | None) -> Any:
    """A part of a composition; a YAML file that it names in another file is found from that file's folder."""
    if isinstance(part, Mapping) and "base" in part:
        return {**part, "base": _anchored(part["base"], folder)}
    return str(Path(folder or "", part).resolve()) if isinstance(part, str) and part.endswith((".yaml", ".yml")) else part


def _locate(name: str, key: str, folder: Path | None) -> str | Path:
    """The name of a preset, or the full path of a YAML file; one named in a file is relative to that file's folder."""
    if name in presets() or name in compositions():
        return name
    if not name.endswith((".yaml", ".yml")):
        raise unknown(key, name, [*presets(), *compositions()])
    path = Path(folder or "", name).resolve()
    if not path.is_file():
        raise SpecError(f"{key}={name!r}: there is no file {str(path)!r}")
    return path


def _read_yaml(where: str | Path, key: str) -> Any:
    from omegaconf import OmegaConf

    folder = ("presets", "compositions") if where in compositions() else ("presets",)
    path = where if isinstance(where, Path) else resources.files("ttr").joinpath(*folder, f"{where}.yaml")
    try:
        return OmegaConf.to_container(OmegaConf.create(path.read_text()), resolve=True)
    except Exception as error:  # of the parser or of an interpolation
        raise SpecError(f"{key}={str(where)!r} is not a YAML mapping: {error}") from error


def merge(base: Any, over: Any, key: str) -> Any:
    """`over` on top of `base`: mappings without `kind` merge key by key, anything else replaces. key: where they stand."""
    if not (isinstance(over, Mapping) and "kind" not in over):
        return over
    if is_dataclass(base):
        base = dump(base)
    if isinstance(base, str):
        base = {_meaning(base, key): base}
    if not isinstance(base, Mapping):
        return dict(over)
    return {**base, **{k: merge(base[k], v, k) if k in base else v for k, v in over.items()}}


def _meaning(word: str, key: str) -> str:
    """What a bare word is shorthand for: {base: word} of a part, {at: word} of read, {kind: word}, or {map: word} of a signal."""
    if key in PARTS:
        return "base"
    if key == "read":
        return "at"
    return "kind" if key in (*SLOTS, "map", "step_rule", "mirror") or word not in SIGNAL_MAPS.kinds() else "map"
