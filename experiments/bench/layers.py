"""Whole layers with nonlinear memories, projections included: [B, T, width] in and out, width = heads x channels, bf16."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ttr
from experiments.bench import peers
from experiments.bench.case import COMPILED, Case, Contender
from experiments.bench.shapes import Shape

MINI_BATCH = 64  # the preset titans'
PATHS = {"titans": "triton", "lact": {"kind": "dual", "compile": True}}  # preset -> ours
MODES = {"titans": "default", "lact": "reduce-overhead"}  # of torch.compile: what is bound by its launches is replayed as a CUDA graph


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """x: [B, T, width] in bf16."""

    x: Tensor
    shape: Shape

    @property
    def like_output(self) -> Tensor:
        return self.x


@dataclass(frozen=True, kw_only=True)
class Layer(Case):
    """`preset`: of our Mixer, with the shape's heads. Layers are different functions, so outputs are not compared."""

    preset: str
    operations: Callable[[Shape, str], float] | None = None

    def inputs(self, shape: Shape, *, requires_grad: bool, device: str = "cuda") -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(shape.B, shape.T, shape.H * shape.dk, generator=generator, device=device).bfloat16()
        return Inputs(x=x.requires_grad_(requires_grad), shape=shape)

    def contender(self, who: str, x: Inputs) -> Contender:
        """Gradients are taken of the input and of every parameter in use."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, forward = self._ours(x.shape, who == COMPILED) if peers.peer_of(who) == "ttr" else _titans_pytorch(x.shape, who)
        module.to(x.x.device, torch.bfloat16).requires_grad_(x.x.requires_grad)
        # titans-pytorch keeps the network that it made its memories' initial weights from
        used = [p for name, p in module.named_parameters() if not name.startswith("memory_model.")]
        return Contender(call=lambda: forward(x.x), leaves=[x.x, *used])

    def _ours(self, shape: Shape, compiled: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        path = PATHS[self.preset]
        if compiled and not isinstance(path, str):
            path = path["kind"]  # once is enough
        mixer = ttr.Mixer(shape.H * shape.dk, self.preset, n_heads=shape.H, head_dim=shape.dk, path=path)
        return mixer, torch.compile(mixer, fullgraph=True, mode=MODES[self.preset]) if compiled else mixer

    def compared(self, who: str, o: Tensor, x: Inputs) -> None:
        return None

    def flops(self, shape: Shape, kind: str) -> float | None:
        return None if self.operations is None else self.operations(shape, kind)

    def counts_memory(self, who: str) -> bool:
        return who != COMPILED or MODES[self.preset] == "default"  # a CUDA graph's lies in a pool of its own

    def note(self, who: str, shape: Shape) -> str:
        if peers.peer_of(who) != "ttr":
            return super().note(who, shape)
        path = PATHS[self.preset]
        if who == COMPILED:
            kind = path if isinstance(path, str) else path["kind"]
            graph = "" if MODES[self.preset] == "default" else f' (mode="{MODES[self.preset]}")'
            return f"path {kind}; the layer through torch.compile{graph}"
        return f"path {path}" if isinstance(path, str) else f"path {path['kind']}, compiled"


def _titans_pytorch(shape: Shape, who: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = importlib.import_module("titans_pytorch").NeuralMemory(
        dim=shape.H * shape.dk, dim_head=shape.dk, heads=shape.H, chunk_size=MINI_BATCH,
        batch_size=MINI_BATCH if who == "titans_pytorch-b64" else None,
        momentum=True, default_model_kwargs={"depth": 2, "expansion_factor": 4.0},
    )  # fmt: skip
    return module, lambda x: module(x)[0]
