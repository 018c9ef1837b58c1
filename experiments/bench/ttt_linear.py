"""TTT-Linear's inner loop alone, our `regress` beside fla's ops, on inputs for which both write the same memory.

Both take the gradient of 1/2 |k + LN(k W + b) - v|^2 at the weights their mini-batch of 16 began with. Where they differ:

    rate    fla's eta belongs to the reading token: W_i = W_0 - eta_i sum_{j <= i} g_j; our step to the written one:
            W_i = W_0 - sum_{j <= i} step_j g_j, with step = eta D as our loss is averaged over channels.
            Here eta is the same for the tokens of a mini-batch: then both are one.
    read    ours is the published q + LN(Z), Z = q W + b; fla's is Z + LN(Z). With the norm's weight at 1 and its bias
            at 0 the first less q and the LayerNorm of the second are both LN(Z): these are compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import ttr
from experiments.bench import peers
from experiments.bench.case import COMPILED, Case, Contender, path_note
from experiments.bench.shapes import Shape, floor_bytes

MINI_BATCH = 16
WEIGHT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, k, v: [B, T, H, D], eta: [B, T, H] in bf16; the initial W: [H, D, D] and b, the norm's weight and bias: [H, D] float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    W: Tensor
    b: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    @property
    def like_output(self) -> Tensor:
        return self.v

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.eta, self.W, self.b, self.norm_weight, self.norm_bias]


@dataclass(frozen=True, kw_only=True)
class TTTLinear(Case):
    """`declaration`: depth 1 with a bias, LayerNorm and the input added, without a factor by position."""

    declaration: Mapping[str, Any]

    def inputs(self, shape: Shape, *, requires_grad: bool, device: str = "cuda") -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        B, T, H, D = shape.B, shape.T, shape.H, shape.dk
        q, k, v = (normal(B, T, H, D).bfloat16() for _ in "qkv")
        rates = torch.sigmoid(normal(B, -(-T // MINI_BATCH), H)) / (MINI_BATCH * D)
        made = Inputs(
            q=q, k=k, v=v, eta=rates.bfloat16().repeat_interleave(MINI_BATCH, 1)[:, :T].contiguous(),
            W=WEIGHT_STD * normal(H, D, D), b=torch.zeros(H, D, device=device),
            norm_weight=torch.ones(H, D, device=device), norm_bias=torch.zeros(H, D, device=device),
        )  # fmt: skip
        for x in made.leaves():
            x.requires_grad_(requires_grad)
        return made

    def contender(self, who: str, x: Inputs) -> Contender:
        """o: [B, T, H, D]. Ours gives the final state out, peers are not asked for theirs."""
        call = self._ours(x) if peers.peer_of(who) == "ttr" else _fla(who, x)
        return Contender(call=torch.compile(call, fullgraph=True, mode="reduce-overhead") if who == COMPILED else call, leaves=x.leaves())

    def _ours(self, x: Inputs):
        spec, D = ttr.spec(self.declaration), x.q.shape[-1]
        params = {"W1": x.W, "b1": x.b, "norm_weight": x.norm_weight, "norm_bias": x.norm_bias}
        return lambda: ttr.regress(x.q, x.k, x.v, spec, step=D * x.eta.float(), params=params)[0]

    def compared(self, who: str, o: Tensor, x: Inputs) -> Tensor:
        return o.float() - x.q.float() if peers.peer_of(who) == "ttr" else layer_norm(o.float(), o.shape[-1:])

    def floor_bytes(self, shape: Shape, kind: str) -> int:
        return floor_bytes(shape, kind)

    def counts_memory(self, who: str) -> bool:
        return who != COMPILED  # a CUDA graph's lies in a pool of its own

    def note(self, who: str, shape: Shape) -> str:
        if who == COMPILED:
            return 'the call through torch.compile (mode="reduce-overhead")'
        return path_note(ttr.spec(self.declaration), shape) if who == "ttr" else super().note(who, shape)


def _fla(who: str, x: Inputs):
    ops = importlib.import_module("fla.ops.ttt")
    op = ops.fused_chunk_ttt_linear if who == "fla-fused" else ops.chunk_ttt_linear
    B, dtype = len(x.q), x.q.dtype

    def call() -> Tensor:
        return op(
            x.q, x.k, x.v, x.norm_weight.to(dtype), x.norm_bias.to(dtype), x.eta[..., None], scale=1.0, chunk_size=MINI_BATCH,
            initial_state=x.W.expand(B, -1, -1, -1), initial_state_bias=x.b[:, None].expand(B, -1, -1, -1),
        )[0]  # fmt: skip

    return call
