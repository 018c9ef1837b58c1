"""Timeline: which token follows which, in a batch of equal lengths or in one packed row of sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.short_conv import short_conv


class Timeline:
    """B sequences of T tokens each; `Packed` is its variable-length sibling."""

    places: tuple[Tensor, Tensor] | None = None  # of a packed row, the sequence of each token and its place in it

    def __init__(self, n_sequences: int):
        self.n_sequences = n_sequences

    def lags(self, x: Tensor, count: int, history: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """x: [B, T, C] -> x and its `count` predecessors, newest first, and the last `count` inputs [N, count, C].

        history: [N, count, C], what came before x; None is zeros.
        """
        rows, T = self._rows(x, count, history), x.shape[1]
        return [rows[:, count - lag : count - lag + T] for lag in range(count + 1)], rows[:, T:].clone()

    def _rows(self, x: Tensor, count: int, history: Tensor | None) -> Tensor:
        if history is None:
            history = x.new_zeros(x.shape[0], count, x.shape[2])
        return torch.cat([history.to(x.dtype), x], dim=1)

    def last(self, x: Tensor, count: int, history: Tensor | None) -> Tensor:
        """The last `count` inputs of every sequence, [N, count, C], in a tensor of their own; arguments as of `lags`."""
        T = x.shape[1]
        if torch.compiler.is_compiling() or count > T:  # a compiled graph has no branch by the length
            return self.lags(x, count, history)[1]
        return x[:, T - count :].clone()  # a view would keep the whole input alive

    def convolve(self, x: Tensor, weight: Tensor, history: Tensor | None, silu: bool = False) -> tuple[Tensor, Tensor]:
        """y_t = sum_j weight[:, -1 - j] x_{t-j}, or SiLU of it, weight: [C, K] -> y [B, T, C] and the last K - 1 inputs."""

        def formula(x: Tensor, weight: Tensor) -> Tensor:
            return self.weighed(x, weight, history)

        return short_conv(x, weight, history, formula, self.places, silu), self.last(x, weight.shape[1] - 1, history)

    def weighed(self, x: Tensor, weight: Tensor, history: Tensor | None) -> Tensor:
        """`convolve`'s sum in torch's own operations."""
        count = weight.shape[1] - 1
        if torch.compiler.is_compiling():  # which fuses sums, and no convolutions
            return weighed(self.lags(x, count, history)[0], weight)
        rows = self._rows(x, count, history).transpose(1, 2)
        return F.conv1d(rows, weight[:, None].to(x.dtype), groups=x.shape[2]).transpose(1, 2)

    def position(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens before each token [B, T] and after the whole call [N]; start: [N]."""
        T = x.shape[1]
        return start[:, None] + torch.arange(T, device=x.device), start + T


class Packed(Timeline):
    """N sequences one after another in a row [1, total]; cu_seqlens: [N + 1], where each begins."""

    def __init__(self, cu_seqlens: Tensor):
        super().__init__(cu_seqlens.shape[0] - 1)
        self.cu_seqlens = cu_seqlens.long()
        lengths = self.cu_seqlens.diff()
        self.sequence = torch.repeat_interleave(torch.arange(self.n_sequences, device=lengths.device), lengths)
        self.index = torch.arange(len(self.sequence), device=lengths.device) - self.cu_seqlens[self.sequence]
        self.places = self.sequence, self.index

    def lags(self, x, count, history):
        if history is None:
            history = x.new_zeros(self.n_sequences, count, x.shape[2])
        rows = torch.cat([history.to(x.dtype).flatten(0, 1), x[0]])  # every history first, then the tokens
        token = torch.arange(x.shape[1], device=x.device)

        def row(sequence: Tensor, index: Tensor, token: Tensor) -> Tensor:  # index < 0 lies in the history
            return torch.where(index >= 0, len(history) * count + token, sequence * count + count + index)

        lagged = [rows[row(self.sequence, self.index - lag, token - lag)][None] for lag in range(count + 1)]
        back = torch.arange(-count, 0, device=x.device)
        end, length = self.cu_seqlens[1:, None], self.cu_seqlens.diff()[:, None]
        every = torch.arange(self.n_sequences, device=x.device)[:, None]
        return lagged, rows[row(every, length + back, end + back)]

    def last(self, x, count, history):
        return self.lags(x, count, history)[1]

    def weighed(self, x, weight, history):
        return weighed(self.lags(x, weight.shape[1] - 1, history)[0], weight)

    def position(self, x, start):
        return (start[self.sequence] + self.index)[None], start + self.cu_seqlens.diff()


def weighed(lags: list[Tensor], weight: Tensor) -> Tensor:
    """sum_j weight[:, -1 - j] lags[j], newest first, of numbers in the lags' dtype, summed in float32 at least."""
    dtype = lags[0].dtype
    weight, wide = weight.to(dtype), torch.promote_types(dtype, torch.float32)
    y = lags[0].to(wide) * weight[:, -1].to(wide)
    for j, lag in enumerate(lags[1:], start=1):
        y = torch.addcmul(y, lag.to(wide), weight[:, -1 - j].to(wide))
    return y.to(dtype)


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of x: [B, T, ...] where mask: [B, T] holds, as one row [1, total, ...], and its cu_seqlens [B + 1]."""
    lengths = mask.sum(1)
    return x[mask][None], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `pack`; zeros where the mask does not hold."""
    out = packed.new_zeros(*mask.shape, *packed.shape[2:])
    out[mask] = packed[0]
    return out
