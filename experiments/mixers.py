"""Which mixers an experiment compares: labels, declarations, and what the command line makes of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ttr
from ttr.sources import read


@dataclass(frozen=True)
class MixerEntry:
    """A labelled declaration, resolved: plain containers, one mapping per block of the pattern."""

    label: str
    declaration: list[dict[str, Any]]

    def per_block(self, n_layers: int) -> list[dict[str, Any]]:
        """One declaration per block: the pattern, repeated."""
        if n_layers % len(self.declaration):
            raise ValueError(
                f"mixer {self.label!r} lists {len(self.declaration)} declarations, which does not divide model.n_layers={n_layers}"
            )
        return self.declaration * (n_layers // len(self.declaration))


def choose_mixers(listed: Mapping[str, Any], overrides: Mapping[str, Any], common: Mapping[str, Any] | None = None) -> list[MixerEntry]:
    """The mixers to compare.

    `listed` comes from the file. `overrides` may hold "mixers" (a list of labels or declarations: only these),
    "mixer" (one of them) and "mixer.PATH" (a change to that one's declaration, in the words of `ttr.spec`).
    `common` fields of `layer` go under every declaration that does not say otherwise. Raises ValueError.
    """
    changes = {key.removeprefix("mixer."): value for key, value in overrides.items() if key.startswith("mixer.")}
    if "mixer" in overrides and "mixers" in overrides:
        raise ValueError("give one of mixer=... and mixers=[...]")
    chosen = [overrides["mixer"]] if "mixer" in overrides else overrides.get("mixers")
    if chosen is None:
        entries = dict(listed)
    else:
        entries = dict(_find(item, listed) for item in chosen)
    if not entries:
        raise ValueError(
            f"no mixer to train: say mixer=NAME, with a preset ({', '.join([*ttr.presets(), *ttr.compositions()])}) or a YAML path"
        )
    if changes and len(entries) > 1:
        raise ValueError(
            f"{', '.join(f'mixer.{key}' for key in changes)} changes one mixer: say which with mixer=NAME; "
            f"this experiment has {list(entries)}"
        )
    result = []
    for label, declaration in entries.items():
        blocks = declaration if isinstance(declaration, list) else [declaration]
        suffix = "".join(f" {key}={_short(value)}" for key, value in changes.items())
        try:
            resolved = [_resolve(block, common or {}, changes) for block in blocks]
        except (TypeError, ValueError) as error:
            raise ValueError(f"mixer {label!r}: {error}") from error
        result.append(MixerEntry(label + suffix, resolved))
    return result


def _find(item: Any, listed: Mapping[str, Any]) -> tuple[str, Any]:
    """(label, declaration) of a label in the file, a preset, a YAML path, a mapping, or a list of these."""
    if isinstance(item, list):
        found = [_find(part, listed) for part in item]
        return "+".join(label for label, _ in found), [declaration for _, declaration in found]
    if isinstance(item, Mapping):
        return str(item.get("name", "custom")), dict(item)
    if not isinstance(item, str):
        raise ValueError(f"mixer={item!r}: expected a name, a YAML path or a mapping")
    if item in listed:
        return item, listed[item]
    if Path(item).suffix in (".yaml", ".yml"):
        return Path(item).stem, item
    published = [*ttr.presets(), *ttr.compositions()]
    if item not in published:
        known = [*listed, *published]
        close = difflib.get_close_matches(item, known, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"mixer={item!r} is neither a label of this experiment nor a preset.{hint} Known: {known}")
    return item, item


def _resolve(declaration: Any, common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The declaration over the experiment's common layer fields, under the changes, as `ttr` understands it."""
    if isinstance(declaration, str):
        declaration = {"base": declaration}
    if not isinstance(declaration, Mapping):
        raise ValueError(f"{declaration!r}: expected a name, a YAML path, a mapping or a list of these")
    if "compose" in read(declaration):
        return _resolve_composition(declaration, common, changes)
    layer = {**common, **(declaration.get("layer") or {})}
    return ttr.spec({**declaration, "layer": layer}, **changes).to_dict()


def _resolve_composition(declaration: Mapping[str, Any], common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A composition, the common fields under every part that does not say otherwise in the declaration itself."""
    composition = ttr.declare(declaration)
    assert isinstance(composition, ttr.Composition)
    written = declaration.get("compose") or {}
    fields = {}
    for part in composition.parts:
        own = (written[part].get("layer") or {}) if isinstance(written.get(part), Mapping) else {}
        fields |= {f"compose.{part}.layer.{name}": value for name, value in common.items() if name not in own}
    return ttr.declare(ttr.declare(composition, **fields), **changes).to_dict()


def _short(value: Any) -> str:
    return str(value.get("kind", value)) if isinstance(value, Mapping) else str(value)
