"""`explain`: one memory, or a composition of layers by its own equations and an explanation of every part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..layers.compose import ComposedLayer, Composition, Layered, declare
from .memory import Explanation, explain_memory
from .sources import COMPOSITIONS, FRAMEWORK, bibtex
from .text import body, listed_sources, section, size, underlined


@dataclass(frozen=True, repr=False)
class ComposedExplanation:
    """What `ttr.explain` found of a composition; printing it gives a page for a person.

    equations: lines in which the parts are functions. parts: an explanation each, at the tokens that the part has read when
    the layer has read T. state: {part of the layer's state: bytes}, of one sequence, float32. sources: keys of `bibtex`.
    """

    spec: Composition
    equations: tuple[str, ...]
    parts: dict[str, Explanation]
    T: int
    state: dict[str, int]
    sources: tuple[str, ...]
    bibtex: str

    @property
    def name(self) -> str | None:
        return self.spec.name

    @property
    def state_bytes(self) -> int:
        """Of the parts' memories and caches at their largest within T tokens, one sequence in this layer, float32."""
        return sum(self.state.values())

    def __str__(self) -> str:
        names = [f"{part} {e.name or 'unnamed'}" for part, e in self.parts.items()]
        lines = [*self.equations]
        if self.spec.persistent:
            lines.append(f"P: {self.spec.persistent} learned vectors of d_model channels")
        held = ", ".join(f"{part} {size(n)}" for part, n in self.state.items())
        pages = [f"{underlined(name)}\n\n{body(e)}" for name, e in zip(names, self.parts.values(), strict=True)]
        return "\n\n".join(
            [
                underlined(f"{self.name or 'unnamed'}: compose {self.spec.kind} · {', '.join(names)}"),
                section("Composition", lines),
                section("State", [f"per sequence within T = {self.T} tokens: up to {size(self.state_bytes)} ({held}; float32)"]),
                *pages,
                listed_sources(self.sources, self.bibtex),
            ]
        )

    __repr__ = __str__


def explain(
    spec_or_layer: Layered | nn.Module, *, d_model: int | None = None, T: int = 2048
) -> Explanation | ComposedExplanation:  # fmt: skip
    """Explain a declaration, or a layer: its recurrence, coefficients, neighbours, path, costs and sources.

    A composition has equations, and an Explanation for each part. d_model: width of the layer whose costs are given; None
    for a declaration means one head of its head_dim. T: tokens. Raises SpecError for a declaration that cannot be read,
    ValueError for sizes or lengths without a meaning.
    """
    if T < 1:
        raise ValueError(f"T={T}: expected at least 1")
    if isinstance(spec_or_layer, ComposedLayer):
        spec, sources = spec_or_layer.spec, dict(spec_or_layer.mixers())
    elif isinstance(spec_or_layer, nn.Module):
        return explain_memory(spec_or_layer, d_model, T)
    else:
        spec = declare(spec_or_layer)
        if not isinstance(spec, Composition):
            return explain_memory(spec, d_model, T)
        sources = spec.remembered()
    parts = {part: explain_memory(sources[part], d_model, tokens) for part, tokens in spec.tokens_read(T).items()}
    state = {part: e.state_bytes for part, e in parts.items()}
    if "reader" in spec.remembered():  # the memory's weights and slots once more
        state["reader"] = sum(n for what, n in parts["memory"].costs.state.items() if what != "open mini-batch")
    keys = [*COMPOSITIONS.get(spec.name or "", ()), *(key for e in parts.values() for key in e.sources if key != FRAMEWORK), FRAMEWORK]
    unique = tuple(dict.fromkeys(keys))
    return ComposedExplanation(spec, spec.equations(), parts, T, state, unique, bibtex(unique))
