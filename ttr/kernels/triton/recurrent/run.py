"""The launches of one call, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import Bound
from ..shapes import ceil_div, power_of_two
from .backward import backward_kernel
from .forward import forward_kernel

TILE = 8192  # numbers of the slots that a program holds
WARPS = 8
PROGRAMS = 256  # of backward, at least, where there are so many tiles: each group of tiles has sums over values of its own


class Form(NamedTuple):
    """solve: the error looks at the slots. before: queries read before their token's update. heads: of a sequence."""

    solve: bool
    before: bool
    heads: int


class Numbers(NamedTuple):
    """The recurrence as the kernels take it, float32, of n events a token.

    T tokens a row, of which there is one for every sequence and head or, packed, one a head. q: [rows, T, dk]; k: [rows, T, n, dk];
    v (or None): [rows, T, n, dv]; A: [r, r, rows, T, n, d1, d2]; b, c (None unless solve), known (or None): [r, rows, T, n, d1, d2];
    read: [r, rows, T, d1, d2], d1 in (1, dk), d2 in (1, dv), of each its own; known_key, known_value: as k and v, or None; r: a
    power of two.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    A: Tensor
    b: Tensor
    c: Tensor | None
    read: Tensor
    known: Tensor | None
    known_key: Tensor | None
    known_value: Tensor | None


class Kind(NamedTuple):
    """All that decides the launches of a call but the tokens. memories: sequences x heads; widths: (d1, d2) of A, b, c, read, known."""

    device: int
    memories: int
    steps: int
    r: int
    dk: int
    dv: int
    tile: int  # value channels
    groups: int  # of tiles, that backward's programs take in turn
    widths: tuple[tuple[int, int], ...]
    form: Form
    given: tuple[bool, ...]  # which tensors are no None, cu_seqlens the last of them


def kind_of(x: Numbers, first: Tensor, cu_seqlens: Tensor | None, form: Form, *more: Tensor | None) -> Kind:
    """more: what else may be None."""
    r, memories, dk, dv = first.shape
    tile = min(max(1, TILE // (r * power_of_two(dk))), power_of_two(dv))
    widths = tuple((1, 1) if number is None else (number.shape[-2], number.shape[-1]) for number in (x.A, x.b, x.c, x.read, x.known))
    given = tuple(tensor is not None for tensor in (*x, *more, cu_seqlens))
    groups = min(ceil_div(dv, tile), ceil_div(PROGRAMS, memories))
    return Kind(first.get_device(), memories, x.k.shape[2], r, dk, dv, tile, groups, widths, form, given)


@lru_cache(maxsize=1024)
def launch(kernel: str, kind: Kind) -> Bound:
    widths = {f"{name}{axis + 1}": pair[axis] for name, pair in zip("ABCQK", kind.widths, strict=True) for axis in (0, 1)}
    function, beside = {"forward": (forward_kernel, ceil_div(kind.dv, kind.tile)), "backward": (backward_kernel, kind.groups)}[kernel]
    return function.bind(
        (kind.memories, beside), WARPS, H=kind.form.heads, STEPS=kind.steps, R=kind.r, DK=kind.dk, DV=kind.dv,
        BK=power_of_two(kind.dk), BV=kind.tile, SOLVE=kind.form.solve, BEFORE=kind.form.before, PACKED=kind.given[-1], **widths,
    )  # fmt: skip


def forward(x: Numbers, first: Tensor, cu_seqlens: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """o [rows, T, dv] and the last slots, of first [r, memories, dk, dv]."""
    rows, T, _ = x.q.shape
    o, last = first.new_empty(rows, T, first.shape[-1]), torch.empty_like(first)
    launch("forward", kind_of(x, first, cu_seqlens, form, o, last, None))(*x, first, cu_seqlens, o, last, None, T, rows, T)
    return o, last


def backward(
    do: Tensor, dlast: Tensor | None, x: Numbers, first: Tensor, cu_seqlens: Tensor | None, form: Form, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of `Numbers`, in their order, and of first; None of what is None or not wanted."""
    (rows, T, _), (r, memories, dk, dv), steps = x.q.shape, first.shape, x.k.shape[2]
    every = isqrt((T - 1) // steps) + 1  # then about as many slots are kept as are made again
    sequences = memories // form.heads
    pieces = sequences * ceil_div(T, every) if cu_seqlens is None else T // every + sequences
    checkpoints = first.new_empty(pieces, r, form.heads, dk, dv)
    run = launch("forward", kind_of(x, first, cu_seqlens, form, None, None, checkpoints))
    run(*x, first, cu_seqlens, None, None, checkpoints, T, rows, every)
    history, given = first.new_empty(every * steps, *first.shape), kind_of(x, first, cu_seqlens, form)
    gradients = [
        _room(name, tensor, given.groups) if want else None
        for name, tensor, want in zip(Numbers._fields, x, wanted[:-1], strict=True)
    ]  # fmt: skip
    dfirst = torch.empty_like(first) if wanted[-1] else None
    kind = kind_of(x, first, cu_seqlens, form, dlast, *gradients, dfirst)
    launch("backward", kind)(*x, cu_seqlens, checkpoints, history, do, dlast, *gradients, dfirst, T, rows, every, kind.groups)
    return [None if x is None else x[0] if len(x) == 1 else x.sum(0) for x in gradients] + [dfirst]


def _room(name: str, x: Tensor | None, groups: int) -> Tensor | None:
    """For a gradient: a sum over value channels has a part of every group of tiles."""
    if x is None:
        return None
    whole = name in ("v", "known_value") or (name in ("A", "b", "c", "read", "known") and x.shape[-1] > 1)
    return torch.empty(1 if whole else groups, *x.shape, dtype=x.dtype, device=x.device)
