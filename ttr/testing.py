"""Conformance: one call is run along every path and held against the definition in float64.

Third-party pieces reuse it: `assert_conforms({"optimizer": "mine", "gate": "vector"})` checks outputs, final state and
the gradient of every input, on every path the declaration has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .choice import targets
from .kernels.api import regress
from .spec import Spec
from .spec import spec as read_spec
from .state import State, flatten

# forgetting nothing, almost nothing, a lot, all but all, and everything, besides ordinary gates
EXTREME_LOG_DECAYS = (0.0, -1e-3, -30.0, -100.0, float("-inf"), -0.5, -0.05)


@dataclass(frozen=True)
class Inputs:
    """One call of `ttr.regress`: tensors by argument name (signals among them), and what is not differentiated."""

    spec: Spec
    tensors: dict[str, Tensor]
    params: dict[str, Tensor]
    initial_state: Tensor | State | None = None
    cu_seqlens: Tensor | None = None

    def to(self, to: torch.dtype | torch.device | str) -> Inputs:
        """The same call in another dtype or on another device."""
        state = self.initial_state
        return replace(
            self,
            tensors={n: t.to(to) for n, t in self.tensors.items()},
            params={n: t.to(to) for n, t in self.params.items()},
            initial_state=state.to(to) if isinstance(state, Tensor) else state,
            cu_seqlens=self.cu_seqlens if self.cu_seqlens is None or isinstance(to, torch.dtype) else self.cu_seqlens.to(to),
        )

    def tokens(self, a: int, b: int) -> Inputs:
        """The call on tokens a..b."""
        cut = {n: t if n == "log_decay" and t.ndim == 1 else t[:, a:b] for n, t in self.tensors.items()}
        return replace(self, tensors=cut)


def random_inputs(
    spec: Any, *, T: int, B: int = 2, H: int = 1, Hv: int = 2, dk: int = 4, dv: int = 3, seed: int = 0,
    dtype: torch.dtype = torch.float64, extreme: bool = True, correlation: float = 0.5, state: bool = True,
) -> Inputs:  # fmt: skip
    """Random arguments for a declaration: unit keys of the given mean correlation, steps up to 2 (1 for momenta),
    gates mixed from EXTREME_LOG_DECAYS, a random initial state for linear regressors."""
    spec = read_spec(spec)
    n = spec.steps
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if spec.regressor.kind == "mlp" and spec.regressor.residual:
        dv = dk
    events = (n,) if n > 1 else ()
    common = normal(B, 1, *([1] * len(events)), H, dk)

    def keys() -> Tensor:
        k = correlation**0.5 * common + (1 - correlation) ** 0.5 * normal(B, T, *events, H, dk)
        return torch.nn.functional.normalize(k, dim=-1)

    tensors = {"q": normal(B, T, H, dk), "k": keys(), "v": normal(B, T, *events, Hv, dv)}
    if spec.separate_write_key:
        tensors["write_key"] = keys()
    if spec.read.normalizer == "sum":  # what the published maps give: positive features
        tensors |= {name: tensors[name].abs() + 0.1 for name in ("q", "k")}
    for name, s in spec.signals().items():
        if s.constant:
            continue
        width = () if s.per == "head" else (s.width(dk, dv, len(spec.weight_names), spec.window),)
        if name == "log_decay":
            choices = torch.tensor(EXTREME_LOG_DECAYS if extreme else (-0.5, -0.05, -0.005), dtype=torch.float64)
            tensors[name] = choices[torch.randint(len(choices), (B, T, Hv, *width), generator=generator)]
        else:
            scale = 2.0 if name == "step" and spec.regressor.linear and not spec.optimizer.slots else 0.9
            micro = () if name in spec.gate.signals() else events
            tensors[name] = scale * uniform(B, T, *micro, Hv, *width)
    params = spec.init_params(Hv, dk, dv, dtype=torch.float64, generator=generator)
    params = {name: p + 0.1 * normal(*p.shape) for name, p in params.items()}
    bare = spec.regressor.linear and spec.read.normalizer == "none" and state
    initial = 0.3 * normal(B, Hv, dk, dv) if bare else None
    return Inputs(spec, tensors, params, initial).to(dtype)


def pack(inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """Row 0 of B sequences cut to `lengths` and laid end to end, one initial state each."""
    rows = {n: torch.cat([t[i, :length] for i, length in enumerate(lengths)])[None] for n, t in inputs.tensors.items()}
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return replace(inputs, tensors=rows, cu_seqlens=bounds)


def call(inputs: Inputs, path: str | Mapping[str, Any] = "auto") -> tuple[Tensor, State]:
    arguments: dict[str, Any] = dict(inputs.tensors)
    q, k, v = (arguments.pop(n) for n in ("q", "k", "v"))
    return regress(
        q, k, v, inputs.spec, **arguments, params=inputs.params, initial_state=inputs.initial_state, cu_seqlens=inputs.cu_seqlens, path=path
    )


def evaluate(
    inputs: Inputs, path: str | Mapping[str, Any] = "auto", splits: Sequence[int] = (), gradients: bool = True
) -> dict[str, Tensor]:
    """Outputs, final state and the gradient of every input along a path; `splits`: tokens at which the state is handed on."""
    leaves = {**inputs.tensors, **inputs.params}
    if isinstance(inputs.initial_state, Tensor):
        leaves["initial_state"] = inputs.initial_state
    leaves = {n: t.detach().requires_grad_(gradients) for n, t in leaves.items()}
    live = replace(
        inputs,
        tensors={n: leaves[n] for n in inputs.tensors},
        params={n: leaves[n] for n in inputs.params},
        initial_state=leaves.get("initial_state", inputs.initial_state),
    )
    outputs, bounds = [], [0, *splits, next(iter(inputs.tensors.values())).shape[1]]
    for a, b in itertools.pairwise(bounds):
        o, state = call(live.tokens(a, b), path)
        outputs.append(o)
        live = replace(live, initial_state=state)
    out = {"o": torch.cat(outputs, 1)} | flatten({"weights": state.weights, "slots": state.slots, "mini_batch": state.mini_batch})
    if gradients:
        # every output counts with its own weight, so that no error can cancel
        floats = [t for t in out.values() if t.is_floating_point()]
        # made in float64: in float16 linspace counts past its largest number
        weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64, device=t.device).view_as(t).to(t.dtype) for t in floats]
        loss = torch.stack([(t * w).sum().double() for t, w in zip(floats, weights, strict=True)]).sum()
        got = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        out |= {f"d {name}": torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, got, strict=True)}
    return {name: t.detach() for name, t in out.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|; infinite when anything is not finite or shapes differ.

    A reference below 1e-6 throughout (the gradient of q when there is one key to look at) counts as 1e-6.
    """
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    return error / max(scale, 1e-6)


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    if got.keys() != expected.keys():
        raise AssertionError(f"one side lacks {sorted(got.keys() ^ expected.keys())}")
    return {name: relative_error(got[name], expected[name]) for name in expected}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float | Mapping[str, float], what: str) -> None:
    for name, error in errors(got, expected).items():
        limit = bound if isinstance(bound, (int, float)) else bound[name]
        assert error <= limit, f"{what}: {name} is off by {error:.2e}, allowed {limit:.2e}"


def assert_conforms(
    spec: Any, *, paths: Sequence[str] | None = None, T: int = 9, chunk_sizes: Sequence[int] = (4,), bound: float = 1e-9, **inputs: Any
) -> None:
    """Assert that every path of a declaration reproduces the definition in float64: outputs, final state, gradients."""
    spec = read_spec(spec)
    case = random_inputs(spec, T=T, **inputs)
    expected = evaluate(case, "definition")
    for path in paths or [p for p in targets(spec) if p != "definition"]:
        options = [{"kind": path, "chunk_size": c} for c in chunk_sizes] if path == "chunk" else [path]
        for option in options:
            assert_close(evaluate(case, option), expected, bound, f"{spec.to_dict()} on {option}")
