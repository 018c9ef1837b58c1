"""Problem: one validated call in the layout that every path takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec import Spec
from ..state import State


@dataclass(frozen=True)
class Problem:
    """N sequences padded to T tokens, H = Hv memories each, n micro-steps a token, in float32 or float64.

    q: [N, H, T, dk], already scaled. k, write_key: [N, H, T, n, dk]. v: [N, H, T, n, dv], with the normaliser's
    channel of ones last if one is declared. signals: name -> [N, H, T, n, d1, d2], d1 in (1, dk), d2 in (1, dv).
    log_decay: [N, H, T, d1]. params: name -> [H, ...]. state: what was learned before the first token.
    lengths: the tokens of each sequence that are real, or None when all T are; what lies behind is no event.
    operands: what a call in bf16 lets the dual form round the operands of large products to; None: nothing.
    fresh: nobody gave the state, so that where it stands is known without looking into it (on a GPU, under torch.compile).
    """

    spec: Spec
    q: Tensor
    k: Tensor
    v: Tensor
    write_key: Tensor | None
    signals: dict[str, Tensor]
    log_decay: Tensor | None
    params: dict[str, Tensor]
    state: State
    lengths: list[int] | None
    operands: torch.dtype | None = None
    fresh: bool = False

    @property
    def positions(self) -> list[int]:
        """Where in a mini-batch each sequence begins."""
        open_ = self.state.mini_batch
        return [0] * self.q.shape[0] if self.fresh or "position" not in open_ else open_["position"].tolist()

    @property
    def valid(self) -> Tensor | None:
        """[N, T] bool, or None when every token is real."""
        if self.lengths is None:
            return None
        lengths = torch.tensor(self.lengths, device=self.q.device)
        return torch.arange(self.q.shape[2], device=self.q.device) < lengths[:, None]

    def padded(self, length: int) -> Problem:
        """The same problem with every sequence padded to `length` tokens (copies of its last one, which are no events)."""
        N, T = self.q.shape[0], self.q.shape[2]
        if length == T:
            return self

        def take(x: Tensor) -> Tensor:  # not by index: the code that Inductor 2.13 makes of that gradient for a CPU writes elsewhere
            return torch.cat([x, x[:, :, -1:].expand(-1, -1, length - T, *x.shape[3:])], 2)

        return replace(
            self, q=take(self.q), k=take(self.k), v=take(self.v),
            write_key=None if self.write_key is None else take(self.write_key),
            signals={name: take(s) for name, s in self.signals.items()},
            log_decay=None if self.log_decay is None else take(self.log_decay),
            lengths=[T] * N if self.lengths is None else self.lengths,
        )  # fmt: skip

    def copy(self) -> Problem:
        """The same problem on tensors of its own."""
        return replace(
            self, q=self.q.clone(), k=self.k.clone(), v=self.v.clone(),
            write_key=None if self.write_key is None else self.write_key.clone(),
            signals={name: s.clone() for name, s in self.signals.items()},
            log_decay=None if self.log_decay is None else self.log_decay.clone(),
            params={name: p.clone() for name, p in self.params.items()}, state=self.state.clone(),
        )  # fmt: skip

    def sequence(self, i: int) -> Problem:
        """Sequence i alone, without its padding."""
        t = self.q.shape[2] if self.lengths is None else self.lengths[i]

        def cut(x: Tensor) -> Tensor:
            return x[i : i + 1, :, :t]

        return replace(
            self, q=cut(self.q), k=cut(self.k), v=cut(self.v),
            write_key=None if self.write_key is None else cut(self.write_key),
            signals={name: cut(s) for name, s in self.signals.items()},
            log_decay=None if self.log_decay is None else cut(self.log_decay),
            state=self.state._map(lambda x: x[i : i + 1]), lengths=None,
        )  # fmt: skip
