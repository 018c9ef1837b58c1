"""The launches of one call, forward and backward."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import Bound, prepare
from ..shapes import ceil_div, power_of_two
from .backward import backward_kernel
from .forward import forward_kernel

TILE = 8192  # numbers of the slots that a program holds
WARPS = 8


class Form(NamedTuple):
    """solve: the error looks at the slots. before: queries read before their token's update."""

    solve: bool
    before: bool


class Numbers(NamedTuple):
    """The recurrence as the kernels take it, float32, of `heads` memories, `T` tokens and `n` events a token.

    q: [heads, T, dk]; x (None unless solve), w: [heads, T, n, dk]; v (or None): [heads, T, n, dv]; A: [r, r, heads, T, n, d1, d2];
    b, c (None unless solve), known (or None): [r, heads, T, n, d1, d2]; read: [r, heads, T, d1, d2], d1 in (1, dk), d2 in (1, dv), of each
    its own; known_key, known_value: as w and v, or None; r: a power of two.
    """

    q: Tensor
    x: Tensor | None
    w: Tensor
    v: Tensor | None
    A: Tensor
    b: Tensor
    c: Tensor | None
    read: Tensor
    known: Tensor | None
    known_key: Tensor | None
    known_value: Tensor | None


class Kind(NamedTuple):
    """All that decides the launches of a call but the lengths. widths: (d1, d2) of A, b, c, read, known."""

    device: int
    heads: int
    steps: int
    r: int
    dk: int
    dv: int
    widths: tuple[tuple[int, int], ...]
    form: Form
    given: tuple[bool, ...]  # which tensors are no None

    @property
    def tile(self) -> int:
        """Value channels of a program."""
        return min(max(1, TILE // (self.r * power_of_two(self.dk))), power_of_two(self.dv))

    @property
    def tiles(self) -> int:
        return ceil_div(self.dv, self.tile)


def kind_of(x: Numbers, first: Tensor, form: Form, *wanted: Tensor | None) -> Kind:
    """wanted: what else may be None."""
    r, heads, dk, dv = first.shape
    widths = tuple((1, 1) if number is None else (number.shape[-2], number.shape[-1]) for number in (x.A, x.b, x.c, x.read, x.known))
    given = tuple(tensor is not None for tensor in (*x, *wanted))
    return Kind(first.get_device(), heads, x.w.shape[2], r, dk, dv, widths, form, given)


@lru_cache(maxsize=1024)
def launch(kernel: str, kind: Kind) -> Bound:
    widths = {f"{name}{axis + 1}": pair[axis] for name, pair in zip("ABCQK", kind.widths, strict=True) for axis in (0, 1)}
    return {"forward": forward_kernel, "backward": backward_kernel}[kernel].bind(
        (kind.tiles, kind.heads), WARPS, STEPS=kind.steps, R=kind.r, DK=kind.dk, DV=kind.dv, BK=power_of_two(kind.dk), BV=kind.tile,
        SOLVE=kind.form.solve, BEFORE=kind.form.before, **widths,
    )  # fmt: skip


def forward(x: Numbers, first: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """o [heads, T, dv] and the last slots, of first [r, heads, dk, dv]."""
    if first.is_cuda:
        prepare()
    heads, T, _ = x.q.shape
    o, last = first.new_empty(heads, T, first.shape[-1]), torch.empty_like(first)
    launch("forward", kind_of(x, first, form, o, last, None))(*x, first, o, last, None, T, heads, T)
    return o, last


def backward(do: Tensor, dlast: Tensor | None, x: Numbers, first: Tensor, form: Form) -> list[Tensor | None]:
    """The gradients of `Numbers`, in their order, and of first."""
    if first.is_cuda:
        prepare()
    (heads, T, _), steps = x.q.shape, x.w.shape[2]
    every = isqrt(T - 1) + 1  # as many states are kept as are made again
    checkpoints = first.new_empty(ceil_div(T, every), *first.shape)
    launch("forward", kind_of(x, first, form, None, None, checkpoints))(*x, first, None, None, checkpoints, T, heads, every)
    history = first.new_empty(every * steps, *first.shape)
    kind, dfirst = kind_of(x, first, form, dlast), torch.empty_like(first)
    gradients = [_parts(name, tensor, kind.tiles) for name, tensor in zip(Numbers._fields, x, strict=True)]
    launch("backward", kind)(*x, checkpoints, history, do, dlast, *gradients, dfirst, T, heads, every)
    return [None if x is None else x[0] if len(x) == 1 else x.sum(0) for x in gradients] + [dfirst]


def _parts(name: str, x: Tensor | None, tiles: int) -> Tensor | None:
    """Room for a gradient: a sum over value channels has a part of every tile."""
    if x is None:
        return None
    whole = name in ("v", "known_value") or (name in ("A", "b", "c", "read", "known") and x.shape[-1] > 1)
    return torch.empty(1 if whole else tiles, *x.shape, dtype=x.dtype, device=x.device)
