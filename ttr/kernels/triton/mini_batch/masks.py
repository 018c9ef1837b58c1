"""R, Q0, F and phi of mini-batches whose optimizer carries one slot beside the weights, from the numbers of their tokens.

`two_slots.levels` makes what the tokens of a block do to each other by doubling; here it is written out as the scans take it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from ..launch import Bound, kernel, prepare
from ..two_slots.levels import levels_kernel, levels_of, load_column, load_read, masks
from ..two_slots.levels_gradient import levels_gradient_kernel


@kernel("batches")
def masks_kernel(levels, mask, rows, written, batches, HV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr):
    """One mini-batch and head a program. mask: [N, batches, Hv, C, C]; rows, written: [N, batches, Hv, 2, C]."""
    head = tl.program_id(1)
    t = tl.arange(0, C)
    place = tl.program_id(0).to(tl.int64) * HV + head
    here = levels_of(levels, tl.program_id(0), head, HV, C, LEVELS)
    _looks, reads = masks(here, t, C, LEVELS, False)
    tl.store(mask + place * C * C + t[:, None] * C + t[None, :], tl.where(t[:, None] >= t[None, :], reads, 0.0))
    first, second = load_read(here, LEVELS, t, C)
    tl.store(rows + place * 2 * C + t, first)
    tl.store(rows + place * 2 * C + C + t, second)
    first, second = load_column(here, LEVELS, t, C)
    tl.store(written + place * 2 * C + t, first)
    tl.store(written + place * 2 * C + C + t, second)


@kernel("batches")
def masks_gradient_kernel(
    levels, dmask, drows, dwritten, dlevels, batches, HV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The same backwards: of every level's rows and columns, [chunks, Hv, 6 LEVELS + 7, C]."""
    head = tl.program_id(1)
    t = tl.arange(0, C)
    place = tl.program_id(0).to(tl.int64) * HV + head
    here = levels_of(levels, tl.program_id(0), head, HV, C, LEVELS)
    given = levels_of(dlevels, tl.program_id(0), head, HV, C, LEVELS)
    i = t[:, None]
    j = t[None, :]
    apart = i ^ j
    dread = tl.load(dmask + place * C * C + i * C + j)
    tl.store(given + (6 * LEVELS + 6) * C + t, tl.sum(tl.where(apart == 0, dread, 0.0), 1))
    for level in range(LEVELS):
        x = tl.where((i > j) & (apart >> level == 1), dread, 0.0)
        r0, r1 = load_read(here, level, t, C)
        c0, c1 = load_column(here, level, t, C)
        at = given + 6 * level * C + t
        tl.store(at + 2 * C, tl.sum(x * c0[None, :], 1))
        tl.store(at + 3 * C, tl.sum(x * c1[None, :], 1))
        tl.store(at + 4 * C, tl.sum(x * r0[:, None], 0))
        tl.store(at + 5 * C, tl.sum(x * r1[:, None], 0))
    at = given + 6 * LEVELS * C + t
    tl.store(at + 2 * C, tl.load(drows + place * 2 * C + t))
    tl.store(at + 3 * C, tl.load(drows + place * 2 * C + C + t))
    tl.store(at + 4 * C, tl.load(dwritten + place * 2 * C + t))
    tl.store(at + 5 * C, tl.load(dwritten + place * 2 * C + C + t))


@lru_cache(maxsize=1024)
def launches(blocks: int, HV: int, size: int, before: bool, device: int) -> dict[str, Bound]:
    few, grid = {"HV": HV, "C": size, "LEVELS": size.bit_length() - 1}, (blocks, HV)
    whole = {**few, "BEFORE": before, "PACKED": False}
    return {
        "levels": levels_kernel.bind(grid, 1, **whole),
        "levels, kept": levels_kernel.bind(grid, 1, **whole),
        "masks": masks_kernel.bind(grid, 4, **few),
        "masks_gradient": masks_gradient_kernel.bind(grid, 4, **few),
        "levels_gradient": levels_gradient_kernel.bind(grid, 1, ERASE=False, **whole),
    }


def made(numbers: Tensor, size: int, before: bool, back: bool):
    """levels, phi and, for the way back, what blocks keep; the launches and the sizes of this call."""
    if numbers.is_cuda:
        prepare()
    _, N, T, HV = numbers.shape
    M, L = T // size, size.bit_length() - 1
    run = launches(N * M, HV, size, before, numbers.get_device())
    levels, mixing = numbers.new_empty(N, M, HV, 6 * L + 7, size), numbers.new_empty(N, M, HV, 2, 2)
    transitions = numbers.new_empty(N, M, HV, L, 4, size) if back else None
    run["levels, kept" if back else "levels"](numbers, levels, mixing, transitions, None, N, T, N * T, 1.0)
    return run, levels, mixing, transitions, (N, T, M, HV)


def are_numbers(written: Tensor) -> bool:
    """Whether what an operator was given as F, [N, T / size, Hv, 2, size], are the numbers instead, [10, N, T, Hv]."""
    return written.ndim == 4


def forward(numbers: Tensor, size: int, before: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, Q0, F and phi. numbers: [10, N, T, Hv], as `two_slots` has them."""
    run, levels, mixing, _, (N, _T, M, HV) = made(numbers, size, before, False)
    mask, rows = numbers.new_empty(N, M, HV, size, size), numbers.new_empty(N, M, HV, 2, size)
    written = torch.empty_like(rows)
    run["masks"](levels, mask, rows, written, M)
    return mask, rows, written, mixing


def backward(dmask, drows, dwritten, dmixing, numbers: Tensor, size: int, before: bool) -> Tensor:
    """The gradient of numbers."""
    run, levels, _, transitions, (N, T, M, _HV) = made(numbers, size, before, True)
    dlevels, dnumbers = torch.empty_like(levels), torch.empty_like(numbers)
    run["masks_gradient"](levels, dmask, drows, dwritten, dlevels, M)
    run["levels_gradient"](numbers, levels, transitions, dlevels, dmixing, dnumbers, None, N, T, N * T, 1.0)
    return dnumbers
