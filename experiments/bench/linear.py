"""Linear memories: our kernels beside others', on q, k, v, a step and a decay; q is scaled by dk^-1/2 in all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

import ttr
from experiments.bench.case import Case, Contender
from experiments.bench.shapes import DEFAULT, EXTENDED, Shape, floor_bytes

GATE_NORMALIZER = 16  # log_decay = logsigmoid(randn) / 16, as GLA's layer has it: the memory reaches over tens of tokens


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, k, v in bf16; step and log_decay (natural log) in float32, None where the mechanism has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor | None
    log_decay: Tensor | None

    @property
    def like_output(self) -> Tensor:
        return self.v

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.step, self.log_decay) if x is not None]

    def token(self) -> Inputs:
        """The first token, without its time axis."""

        def first(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, 0]

        return replace(self, q=self.q[:, 0], k=self.k[:, 0], v=self.v[:, 0], step=first(self.step), log_decay=first(self.log_decay))


@dataclass(frozen=True, kw_only=True)
class Linear(Case):
    """`declaration` is None where we have no kernel to compare and peers only give a yardstick."""

    shapes: tuple[Shape, ...] = DEFAULT
    more: tuple[Shape, ...] = EXTENDED
    declaration: Mapping[str, Any] | None = None
    step: bool = False
    log_decay: bool = False
    unit_keys: bool = False  # q and k of length one

    def inputs(self, shape: Shape, *, requires_grad: bool, device: str = "cuda") -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        q, k = (normal(shape.B, shape.T, shape.H, shape.dk) for _ in "qk")
        if self.unit_keys:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        v = normal(shape.B, shape.T, shape.Hv, shape.dv)
        per_head = shape.B, shape.T, shape.Hv
        made = Inputs(
            q=q.bfloat16(),
            k=k.bfloat16(),
            v=v.bfloat16(),
            step=torch.sigmoid(normal(*per_head)) if self.step else None,
            log_decay=logsigmoid(normal(*per_head)) / GATE_NORMALIZER if self.log_decay else None,
        )
        for x in made.leaves():
            x.requires_grad_(requires_grad)
        return made

    def contender(self, who: str, x: Inputs) -> Contender:
        """o: [B, T, Hv, dv]. Ours gives the final state out, peers are not asked for theirs."""
        call = self._call(who)
        return Contender(call=lambda: call(x), leaves=x.leaves())

    def floor_bytes(self, shape: Shape, kind: str) -> int:
        return floor_bytes(shape, kind)

    def _call(self, who: str) -> Callable[[Inputs], Tensor]:
        if who == "ttr":
            assert self.declaration is not None
            spec = ttr.spec(self.declaration)
            return lambda x: ttr.regress(x.q, x.k, x.v, spec, step=x.step, log_decay=x.log_decay, path="triton")[0]
        if who == "torch":
            return _sdpa
        if who == "flash_qla":
            rule = importlib.import_module("flash_qla").chunk_gated_delta_rule
            return lambda x: rule(x.q, x.k, x.v, g=x.log_decay, beta=x.step)[0]
        ops = importlib.import_module("fla.ops")
        if self.name == "simple_gla":
            return lambda x: ops.chunk_simple_gla(x.q, x.k, x.v, g=x.log_decay)[0]
        if self.name == "delta":
            return lambda x: ops.chunk_delta_rule(x.q, x.k, x.v, beta=x.step)[0]
        return lambda x: ops.chunk_gated_delta_rule(x.q, x.k, x.v, g=x.log_decay, beta=x.step)[0]


def _sdpa(x: Inputs) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
