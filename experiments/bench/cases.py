"""The mechanisms that are measured: our declaration of each, and inputs that are the same for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from experiments.bench.shapes import Shape

GATE_NORMALIZER = 16  # log_decay = logsigmoid(randn) / 16, as GLA's layer has it: the memory reaches over tens of tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mechanism; `declaration` is None where we have no kernel to compare and peers only give a yardstick."""

    name: str
    title: str
    peers: tuple[str, ...]
    declaration: Mapping[str, Any] | None = None
    step: bool = False
    log_decay: bool = False
    unit_keys: bool = False  # q and k of length one

    @property
    def who(self) -> tuple[str, ...]:
        """Everybody who runs it, ours first."""
        return self.peers if self.declaration is None else ("ttr", *self.peers)


CASES = {
    case.name: case
    for case in (
        Case(
            name="simple_gla",
            title="scalar decay (simple GLA)",
            peers=("fla",),
            declaration={"regressor": "linear", "objective": "dot", "optimizer": {"kind": "sgd", "step": 1.0}, "gate": "scalar"},
            log_decay=True,
        ),
        Case(
            name="gated_delta",
            title="gated delta rule",
            peers=("fla", "flash_qla"),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": {"kind": "scalar", "order": "first"}},
            step=True,
            log_decay=True,
            unit_keys=True,
        ),
        Case(
            name="delta",
            title="delta rule",
            peers=("fla",),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": "none"},
            step=True,
            unit_keys=True,
        ),
        Case(name="sdpa", title="causal softmax attention", peers=("torch",)),
    )
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, k, v in bf16; step and log_decay (natural log) in float32, None where the mechanism has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor | None
    log_decay: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.step, self.log_decay) if x is not None]

    def token(self) -> Inputs:
        """The first token, without its time axis."""

        def first(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, 0]

        return replace(self, q=self.q[:, 0], k=self.k[:, 0], v=self.v[:, 0], step=first(self.step), log_decay=first(self.log_decay))


def inputs(case: Case, shape: Shape, *, requires_grad: bool, device: str = "cuda") -> Inputs:
    """Random inputs of a seed of their own."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    q, k = (normal(shape.B, shape.T, shape.H, shape.dk) for _ in "qk")
    if case.unit_keys:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    v = normal(shape.B, shape.T, shape.Hv, shape.dv)
    per_head = shape.B, shape.T, shape.Hv
    made = Inputs(
        q=q.bfloat16(),
        k=k.bfloat16(),
        v=v.bfloat16(),
        step=torch.sigmoid(normal(*per_head)) if case.step else None,
        log_decay=logsigmoid(normal(*per_head)) / GATE_NORMALIZER if case.log_decay else None,
    )
    for x in made.leaves():
        x.requires_grad_(requires_grad)
    return made
