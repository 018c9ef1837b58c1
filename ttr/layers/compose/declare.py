"""One door for every layer: what a declaration declares, and the module that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...choice import PathChoice
from ...registry import COMPOSITIONS, SpecError
from ...schema import parse_kind
from ...sources import COMPOSED_KEYS, read
from ...spec import Spec
from ...spec import spec as read_spec
from ..mixer import Mixer
from .base import ComposedLayer, Composition, Place

Layered = str | Path | Mapping | Spec | Composition


def declare(source: Layered, **overrides: Any) -> Spec | Composition:
    """What `source` declares: one memory (a Spec, as `ttr.spec` gives it), or a composition of layers.

    source: a preset's or composition's name, a YAML path, a mapping, a Spec or a Composition. overrides: slots or dotted
    keys, `declare("titans_mag", **{"compose.window.regressor.window": 64})`. Raises SpecError.
    """
    if isinstance(source, (Spec, Composition)) and not overrides:
        return source
    body = read(source, overrides)
    if "compose" not in body:
        return read_spec(source, **overrides)  # type: ignore[arg-type]
    for key, value in body.items():
        if key not in COMPOSED_KEYS:
            raise SpecError(
                f"{key}={value!r} stands beside compose, which declares whole layers; say it of a part, as compose.memory.{key}"
            )
    composed = parse_kind(COMPOSITIONS, body["compose"], "compose")
    name = body.get("name")
    object.__setattr__(composed, "name", None if name is None else str(name))
    return composed


def layer(
    d_model: int, spec: Layered, *, layer_idx: int = 0, n_layers: int = 1, path: PathChoice = "auto", **layer_overrides: Any
) -> Mixer | ComposedLayer:
    """The layer that `spec` declares, a Mixer or a composition of them: [B, T, d_model] -> [B, T, d_model], causal.

    spec: as `declare` takes it; the rest as in `Mixer`. In a composition layer_overrides go to every part, and path is the
    memory's. Raises SpecError or ValueError when the declaration or the sizes have no meaning.
    """
    declared = declare(spec)
    if isinstance(declared, Spec):
        return Mixer(d_model, declared, layer_idx=layer_idx, n_layers=n_layers, path=path, **layer_overrides)
    if not 0 <= layer_idx < n_layers:
        raise ValueError(f"layer_idx={layer_idx}: expected 0 <= layer_idx < n_layers={n_layers}")
    return declared.build(Place(d_model, layer_idx, n_layers, path, layer_overrides))
