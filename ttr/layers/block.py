"""Block: a pre-norm residual layer and, if wanted, a SwiGLU MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..choice import PathChoice
from .causal import CausalLayer
from .compose import Layered, layer
from .state import LayerState

EPS = 1e-5


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x), hidden width ratio * d_model, a multiple of 8. Source: 2002.05202."""

    def __init__(self, d_model: int, ratio: float = 8 / 3):
        super().__init__()
        hidden = max(8, 8 * round(ratio * d_model / 8))
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def reset_parameters(self) -> None:
        for linear in (self.gate, self.up, self.down):
            linear.reset_parameters()


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): [B, T, d_model] -> [B, T, d_model]."""

    def __init__(
        self,
        d_model: int,
        spec: Layered,
        *,
        mlp: Literal["swiglu"] | None = "swiglu",
        mlp_ratio: float = 8 / 3,
        layer_idx: int = 0,
        n_layers: int = 1,
        path: PathChoice = "auto",
        **layer_overrides: Any,
    ):
        super().__init__()
        if mlp not in ("swiglu", None):
            raise ValueError(f"mlp={mlp!r}: choose from ['swiglu', None]")
        self.mixer_norm = nn.RMSNorm(d_model, eps=EPS)
        self.mixer: CausalLayer[Any] = layer(d_model, spec, layer_idx=layer_idx, n_layers=n_layers, path=path, **layer_overrides)
        self.mlp_norm = nn.RMSNorm(d_model, eps=EPS) if mlp else None
        self.mlp = SwiGLU(d_model, mlp_ratio) if mlp else None

    def forward(self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        return self._feed(x + self.mixer(self.mixer_norm(x), mask=mask, cu_seqlens=cu_seqlens))

    def prefill(
        self, x: Tensor, state: LayerState | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        y, after = self.mixer.prefill(self.mixer_norm(x), state, mask=mask, cu_seqlens=cu_seqlens)
        return self._feed(x + y), after

    def step(self, x_t: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        y_t, after = self.mixer.step(self.mixer_norm(x_t), state)
        return self._feed(x_t + y_t), after

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> LayerState:
        return self.mixer.init_state(batch_size, device=device, dtype=dtype)

    def _feed(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))

    def reset_parameters(self) -> None:
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]
