"""CausalLayer: what every layer of ttr answers to, a single memory or a composition of several."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.arguments import sequences
from ..stages import pack, unpack
from ..state import TreeMethods, flatten

S = TypeVar("S", bound=TreeMethods)


class CausalLayer(nn.Module, Generic[S]):
    """Tensor in, tensor out, token by token or all at once: [B, T, d_model] -> [B, T, d_model].

    A layer defines `run(x, state, cu_seqlens)`, for T > 0 tokens, and `init_state`; S, its `state_class`, is what it remembers.
    """

    d_model: int
    state_class: type[S]

    def run(self, x: Tensor, state: S | None, cu_seqlens: Tensor | None) -> tuple[Tensor, S]:
        """x: [B, T, d_model], checked; state: None at the start."""
        raise NotImplementedError(f"{type(self).__name__} must define run(x, state, cu_seqlens)")

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> S:
        raise NotImplementedError(f"{type(self).__name__} must define init_state(batch_size)")

    def forward(self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x: [B, T, d_model] -> [B, T, d_model]; where mask: [B, T] bool is false, nothing is read and 0 comes out.

        cu_seqlens: [N + 1] int32 for N sequences packed in one row (B = 1).
        """
        return self.prefill(x, mask=mask, cu_seqlens=cu_seqlens)[0]

    def prefill(
        self, x: Tensor, state: S | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S]:  # fmt: skip
        """`forward` from `state`, and the state after the last token; with cu_seqlens, states lead with N."""
        self._check_input(x, mask, cu_seqlens, state)
        if mask is None or bool(mask.all()):
            return self._advance(x, state, cu_seqlens)
        packed, cu_seqlens = pack(x, mask)
        y, after = self._advance(packed, state, cu_seqlens)
        return unpack(y, mask), after

    def step(self, x_t: Tensor, state: S) -> tuple[Tensor, S]:
        """One token: x_t [B, d_model] -> y_t [B, d_model] and the next state."""
        self._check_tensor("x_t", x_t, 2, f"[B, {self.d_model}]")
        self._check_state(state, len(x_t))
        y, state = self._advance(x_t[:, None], state, None)
        return y[:, 0], state

    def _advance(self, x: Tensor, state: S | None, cu_seqlens: Tensor | None) -> tuple[Tensor, S]:
        if x.shape[1] == 0:  # nothing is read
            n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            return x.clone(), self.init_state(n, device=x.device) if state is None else state
        return self.run(x, state, cu_seqlens)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are no matrices of a linear map: biases, norms, time constants, W_0, ..."""
        decayed = {f"{name}.weight" for name, m in self.named_modules() if isinstance(m, nn.Linear)}
        return {name for name, _ in self.named_parameters()} - decayed

    def _check_tensor(self, name: str, x: Any, ndim: int, expected: str) -> None:
        """Of the layer's width and, outside autocast, its dtype."""
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor {expected}")
        if x.ndim != ndim or x.shape[-1] != self.d_model:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")
        weight = next(self.parameters(), x)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name}: got {x.dtype}, expected {weight.dtype} as the layer's parameters (or call it under torch.autocast)")

    def _check_state(self, state: Any, n: int) -> None:
        if not isinstance(state, self.state_class):
            raise ValueError(
                f"state: got {type(state).__name__}, expected a ttr.{self.state_class.__name__} (from prefill, step or init_state)"
            )
        held = {len(t) for t in flatten(state._trees()).values()}
        if held - {n}:
            raise ValueError(f"state: got {sorted(held)} sequences, x has {n}")

    def _check_input(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, state: Any = None) -> None:
        self._check_tensor("x", x, 3, f"[B, T, {self.d_model}]")
        if mask is not None and cu_seqlens is not None:
            raise ValueError("mask and cu_seqlens both say which tokens belong together; give one")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"mask: got {mask.dtype} {list(mask.shape)}, expected torch.bool {list(x.shape[:2])}")
        if cu_seqlens is not None:
            sequences(cu_seqlens, x.shape[0], x.shape[1], x.device)
        n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if state is not None:
            self._check_state(state, n)
