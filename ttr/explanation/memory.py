"""What one memory's declaration computes, how, at what cost, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..choice import select_path, targets
from ..inner_optim import Optimizer
from ..lowering import is_linear
from ..spec import Spec
from ..spec import spec as read_spec
from .coefficients import Coefficients, coefficients
from .costs import Costs, Sizes, costs, sizes
from .place import Neighbour, place
from .recurrence import recurrence
from .signals import SignalNote, signal_notes
from .sources import bibtex, source_keys


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `ttr.explain` found; printing it gives a page for a person.

    recurrence: lines of mathematics. coefficients: A, b, c, read in symbols, probed (None for a rule without them).
    same_as: presets with the same mathematics. neighbours: the nearest other ones and what differs. path, reason: what
    runs T tokens and why; target: the closed form behind it. sizes, costs: see there. signals: the per-token quantities.
    learned: shapes of learned constants by name. sources: keys of `bibtex`.
    """

    spec: Spec
    recurrence: tuple[str, ...]
    coefficients: Coefficients | None
    same_as: tuple[str, ...]
    other_signals: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]
    path: str
    reason: str
    target: str
    T: int
    sizes: Sizes
    costs: Costs
    signals: tuple[SignalNote, ...]
    learned: dict[str, tuple[int, ...]]
    sources: tuple[str, ...]
    bibtex: str

    @property
    def name(self) -> str | None:
        return self.spec.name

    @property
    def place(self) -> str:
        """One sentence: which published mechanism this is, or the nearest one and what differs."""
        if not self.same_as:
            return f"no preset has this mathematics; nearest: {self.neighbours[0]}" if self.neighbours else "no preset is near"
        names = " = ".join(self.same_as)
        if not self.other_signals:
            return f"the mathematics of {names}"
        return f"the mathematics of {names}; made otherwise from the input: {', '.join(self.other_signals)}"

    @property
    def state_bytes(self) -> int:
        """Of one sequence in this layer, float32; after T tokens where it grows."""
        return self.costs.state_bytes

    @property
    def flops_per_token(self) -> int:
        return self.costs.flops_per_token

    @property
    def bytes_per_token(self) -> int:
        return self.costs.bytes_per_token

    def __str__(self) -> str:
        from .text import page

        return page(self)

    __repr__ = __str__


def explain_memory(spec_or_mixer: str | Path | Mapping | Spec | nn.Module, d_model: int | None, T: int) -> Explanation:
    """`ttr.explain` for one memory."""
    spec, s, told = _read(spec_or_mixer, d_model)
    where = place(spec)
    weight = next(spec_or_mixer.parameters(), None) if isinstance(spec_or_mixer, nn.Module) else None
    device = None if weight is None or told != "auto" else weight.device.type  # an explicit path is judged where it runs
    path, reason = select_path(spec, path=told, length=T, device=device, dtype=None if weight is None else weight.dtype, dk=s.dk, dv=s.dv)
    keys = source_keys(spec, where)
    return Explanation(
        spec=spec, recurrence=recurrence(spec), coefficients=coefficients(spec),
        same_as=where.presets, other_signals=where.signals, neighbours=where.neighbours,
        path=path, reason=reason, target=target(spec), T=T, sizes=s, costs=costs(spec, s, T, path),
        signals=signal_notes(spec), learned=spec.param_shapes(s.heads, s.dk, s.dv), sources=keys, bibtex=bibtex(keys, spec),
    )  # fmt: skip


def _read(source: Any, d_model: int | None) -> tuple[Spec, Sizes, str]:
    """The declaration, the sizes of its layer, and the path it was told to take."""
    if not isinstance(source, nn.Module):
        spec = read_spec(source)
        if d_model is not None and d_model < 1:
            raise ValueError(f"d_model={d_model}: expected at least 1")
        return spec, sizes(spec, d_model), "auto"
    spec = getattr(source, "spec", None)
    if not isinstance(spec, Spec):
        mixers = [name for name, m in source.named_modules() if isinstance(getattr(m, "spec", None), Spec)]
        raise ValueError(f"{type(source).__name__} is no Mixer" + (f"; it holds {mixers}: explain one of those" if mixers else ""))
    if d_model is not None and d_model != source.d_model:
        raise ValueError(f"d_model={d_model}: this mixer has d_model={source.d_model}")
    mixer: Any = source
    return spec, Sizes(mixer.d_model, mixer.sizes.heads, mixer.sizes.key_heads, mixer.dk, mixer.dv), mixer.path


def target(spec: Spec) -> str:
    """Which closed form the declaration lowers to: LinearRecurrence, LeastSquares, FrozenGradient, Kernel or Definition."""
    family = {"kernel": "Kernel", "least_squares": "LeastSquares"}.get(spec.regressor.family)
    if family is not None:
        return family
    if isinstance(spec.optimizer, Optimizer) and is_linear(spec):
        return "LinearRecurrence"
    return "FrozenGradient" if "dual" in targets(spec) else "Definition"
