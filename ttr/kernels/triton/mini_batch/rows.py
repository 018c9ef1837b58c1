"""Where the tokens of a call lie while they run: those that go on with an open mini-batch, whole mini-batches, an open last one.

`lay` makes three parts of what comes token by token, [B, T, ...]: the heads, [N, whole, ...] and [N, tail, ...] with zeros where a
row has no token; `join` is its inverse on outputs. whole, tail: tokens of a row, 0 where there are none. events: of the last two
parts, which are tokens, [N or 1, tokens], or None for all.
"""

from __future__ import annotations

from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class Even:
    """Rows of T tokens, their mini-batches open at one position: slices."""

    bounds = unfinished = None  # the heads run together

    def __init__(self, position: int, T: int, size: int, device: torch.device):
        self.head = min(T, -position % size)
        self.end = T - (T - self.head) % size
        self.whole, self.tail, self.rest = self.end - self.head, size if self.end < T else 0, T - self.end
        self.events = None, torch.arange(size, device=device)[None] < self.rest if self.tail else None
        self.position, self.device = (position + T) % size, device

    def positions(self, n: int) -> Tensor:
        """Of n rows in their mini-batch, behind the last token."""
        return torch.full((n,), self.position, device=self.device)

    def lay(self, x: Tensor) -> tuple[Any, ...]:
        if not self.head and not self.tail:
            return None, x, None  # nobody asks for the others, and two slices of every tensor take time
        tail = x[:, self.end :]
        if self.tail:
            tail = pad(tail, (*[0] * (2 * x.ndim - 4), 0, self.tail - self.rest))
        return x[:, : self.head], x[:, self.head : self.end], tail

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, : like.shape[1]]


class Uneven:
    """Any others, packed ones among them: a row is as wide as the longest, up to N times the tokens there are.

    bounds: cu_seqlens of the heads. unfinished: which rows are still in the mini-batch that was open, [N], or None.
    """

    def __init__(self, positions: list[int], lengths: list[int], size: int, device: torch.device):
        N, T = len(lengths), sum(lengths)
        heads = [min(n, -p % size) for p, n in zip(positions, lengths, strict=True)]
        wholes = [(n - h) // size * size for h, n in zip(heads, lengths, strict=True)]
        tails = [n - h - w for h, w, n in zip(heads, wholes, lengths, strict=True)]
        self.head, self.whole, self.tail = sum(heads), max(wholes), size if any(tails) else 0
        first = list(accumulate(heads, initial=0))
        self.bounds = torch.tensor(first)
        self.widths = self.head, N * self.whole, N * self.tail
        places = ((first[i], self.head + i * self.whole, self.head + N * self.whole + i * self.tail) for i in range(N))
        counts = list(chain(*zip(heads, wholes, tails, strict=True)))
        shifts = [place - begin for place, begin in zip(chain(*places), accumulate(counts, initial=0), strict=False)]
        many, shift = torch.tensor([counts, shifts], device=device)
        self.at = torch.arange(T, device=device) + shift.repeat_interleave(many, output_size=T)  # where a token lies
        real = torch.tensor([wholes, tails], device=device)[..., None]
        self.events = torch.arange(self.whole, device=device) < real[0], torch.arange(self.tail, device=device) < real[1]
        self.position = torch.tensor([(p + n) % size for p, n in zip(positions, lengths, strict=True)], device=device)
        unfinished = [p > 0 and p + n < size for p, n in zip(positions, lengths, strict=True)]
        self.unfinished = torch.tensor(unfinished, device=device) if any(unfinished) else None

    def positions(self, n: int) -> Tensor:
        return self.position

    def lay(self, x: Tensor) -> tuple[Tensor, ...]:
        laid = x.new_zeros(sum(self.widths), *x.shape[2:]).index_copy(0, self.at, x.flatten(0, 1))
        head, *rest = laid.split(self.widths)
        N = len(self.position)
        return head[None], *(part.unflatten(0, (N, width)) for part, width in zip(rest, (self.whole, self.tail), strict=True))

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.at).view_as(like)
