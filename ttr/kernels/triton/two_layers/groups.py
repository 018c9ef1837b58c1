"""What runs at a time: some heads and some of their mini-batches, a group; its launches, and what is made anew for each."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import Bound, prepare
from ..shapes import ceil_div, power_of_two
from .advance import advance_kernel
from .outputs import outputs_kernel
from .parts import UNITS, heads_at_once, parts_of, warps_of
from .readers import readers_kernel
from .retreat import retreat_kernel
from .writers import writers_kernel
from .written_gradient import written_gradient_kernel

SCANS = {"advance": advance_kernel, "advance once more": advance_kernel, "retreat": retreat_kernel}
READS = {"outputs": outputs_kernel, "readers": readers_kernel, "writers": writers_kernel}


class Form(NamedTuple):
    """Tokens of a mini-batch, hidden units, the layers and the loss, who reads when.

    f(x) = [x +] [LN](a(x Z + c) Y + d),    dl/df = curvature f - gain v
    """

    size: int
    hidden: int
    biased: bool
    activation: str
    residual: bool
    eps: float
    curvature: float
    gain: float
    before: bool


form_of = cache(Form)


class Kind(NamedTuple):
    """All that decides the launches of a group."""

    heads: int
    count: int
    H: int
    HV: int
    dk: int
    dv: int
    slots: int
    form: Form
    norm: bool
    masked: bool  # these three and the norms: which arguments are None
    factored: bool
    mixed: bool
    dtype: torch.dtype
    device: int


@lru_cache(maxsize=1024)
def launches(kind: Kind) -> dict[str, Bound]:
    form, parts = kind.form, parts_of(kind.form.hidden, kind.device)
    constants: dict[str, Any] = {
        "H": kind.H, "HV": kind.HV, "DK": kind.dk, "DV": kind.dv, "M": form.hidden, "BK": power_of_two(kind.dk),
        "BV": power_of_two(kind.dv), "BM": UNITS, "SIZE": form.size, "ROWS": max(16, power_of_two(form.size)), "SLOTS": kind.slots,
        "BIASED": form.biased, "NORM": kind.norm, "RESIDUAL": form.residual, "ACTIVATION": form.activation,
        "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    reads, scans = (kind.heads * kind.count,), (kind.heads * parts,)
    ahead = 2 if kind.dtype.itemsize == 2 else 1  # float32's tiles leave no room in shared memory
    out = {
        name: kernel.bind(reads, 4, ahead if name == "outputs" else 1, **constants, BEFORE=form.before) for name, kernel in READS.items()
    }
    out["written_gradient"] = written_gradient_kernel.bind(reads, 4, ahead, **constants)
    own = constants | {"BM": UNITS if parts > 1 else max(16, power_of_two(form.hidden)), "PARTS": parts}
    warps = warps_of(kind.heads, form.hidden, kind.device)
    for name, kernel in SCANS.items():
        out[name] = kernel.bind(scans, warps, together=parts > 1, **own)
    return out


class Group(NamedTuple):
    """Some heads of all sequences and some of their mini-batches: what comes first, and how many."""

    first: int
    heads: int
    begin: int
    count: int


def groups(heads: int, batches: int, count: int, together: int) -> list[list[Group]]:
    """For some heads after others (as evenly as they go) the groups of their mini-batches in order."""
    together = ceil_div(heads, ceil_div(heads, together))
    return [
        [Group(first, min(together, heads - first), begin, min(count, batches - begin)) for begin in range(0, batches, count)]
        for first in range(0, heads, together)
    ]


class Made:
    """What is made anew for every group: the memory before each of its mini-batches, X, a'(A), L and U of its tokens.

    group: the largest of those that are made here one after another.
    """

    def __init__(self, q: Tensor, v: Tensor, memory: Tensor, group: Group, form: Form):
        (slots, wide), dv, parts = memory.shape[2:], v.shape[3], parts_of(form.hidden, q.get_device())
        lead = group.count, group.heads, form.size
        self.starts = q.new_empty(*lead[:2], slots, wide)
        self.hidden, self.slopes, self.lower = (q.new_empty(*lead, form.hidden) for _ in range(3))
        self.upper = q.new_empty(*lead, dv)
        self.predicted = torch.empty_like(self.upper, dtype=torch.float32)
        shared = 2 * (parts > 1), group.heads, parts, max(16, power_of_two(form.size)), power_of_two(dv)
        self.partial = q.new_empty(shared, dtype=torch.float32)

    def of(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Of some of a group's mini-batches."""
        return tuple(x[begin:end] for x in (self.starts, self.hidden, self.slopes, self.predicted, self.lower, self.upper))

    def back_at_once(self) -> int:
        """How many mini-batches go back at a time: half of the group, for what is made of them; all where half begins on no 16 bytes."""
        count = len(self.starts)
        half = ceil_div(count, 2)
        return half if all(x.nbytes % 16 == 0 for x in self.of(0, half)) else count


class Back:
    """What is made on the way back of so many of a group's mini-batches: dC, B, dA_q, dX then dA, dL then dG, dU, dP, D and E."""

    def __init__(self, made: Made, count: int):
        starts, hidden, _, _, _, upper = made.of(0, count)
        self.out, self.upper, self.layer = (torch.empty_like(upper) for _ in range(3))
        self.read, self.inner, self.curved, self.hidden, self.lower = (torch.empty_like(hidden) for _ in range(5))
        self.ends = torch.empty_like(starts)


class Prepared:
    """The groups of some sequences, of `count` mini-batches, their launches, and the programs that have arrived at each of them (zeros).

    waiting: how many launches of a group, at most, wait for each other's programs: forward one; backward goes forward once more and
    back in two.
    """

    def __init__(self, q: Tensor, v: Tensor, mask, factor, gamma, slots: int, form: Form, count: int, mixed: bool, waiting: int):
        if q.is_cuda:
            prepare()
        (N, T, H, dk), (HV, dv), device = q.shape, v.shape[2:], q.get_device()
        self.T, self.batches = T, T // form.size
        self.groups = groups(N * HV, self.batches, count, heads_at_once(form.hidden, device))
        given = gamma is not None, mask is not None, factor is not None, mixed
        self.kind = Kind(0, 0, H, HV, dk, dv, slots, form, *given, q.dtype, device)
        launched = waiting * sum(len(own) for own in self.groups)
        self.arrived = iter(q.new_zeros((launched, ceil_div(N * HV, 4) * 4), dtype=torch.int32))  # rows on 16 bytes

    def launches(self, group: Group) -> dict[str, Bound]:
        return launches(self.kind._replace(heads=group.heads, count=group.count))

    def places(self, group: Group) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As scans and as reads take them."""
        whole = self.T, self.batches, group.first
        return (*whole, group.begin, group.count), (*whole, group.heads, group.begin)
