"""The launches of one call, forward and backward: some heads and some mini-batches (a group) after others."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import Bound, prepare
from ..mini_batch import masks
from ..shapes import ceil_div, power_of_two
from .advance import advance_kernel
from .outputs import outputs_kernel
from .parts import UNITS, group_of, heads_at_once, parts_of, row_of, warps_of
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
    """What is made anew for every group: the memory before each of its mini-batches, X, a'(A), L and U of its tokens."""

    def __init__(self, q: Tensor, v: Tensor, memory: Tensor, group: Group, form: Form):
        (slots, wide), dv, parts = memory.shape[2:], v.shape[3], parts_of(form.hidden, q.get_device())
        self.size, lead = (group.heads, group.count), (group.count, group.heads, form.size)
        self.starts = q.new_empty(*lead[:2], slots, wide)
        self.hidden, self.slopes, self.lower = (q.new_empty(*lead, form.hidden) for _ in range(3))
        self.upper = q.new_empty(*lead, dv)
        self.predicted = torch.empty_like(self.upper, dtype=torch.float32)
        shared = 2 * (parts > 1), group.heads, parts, max(16, power_of_two(form.size)), power_of_two(dv)
        self.partial = q.new_empty(shared, dtype=torch.float32)

    def of(self, begin: int = 0, end: int | None = None) -> tuple[Tensor, ...]:
        """Of some of the mini-batches."""
        return tuple(x[begin:end] for x in (self.starts, self.hidden, self.slopes, self.predicted, self.lower, self.upper))

    def back_at_once(self) -> int:
        """How many mini-batches go back at a time: half of the group, for what is made of them; all where half begins on no 16 bytes."""
        half = ceil_div(self.size[1], 2)
        return half if all(x[:half].nbytes % 16 == 0 for x in self.of()) else self.size[1]


class Back:
    """What is made on the way back of so many of a group's mini-batches: dC, B, dA_q, dX then dA, dL then dG, dU, dP, D and E."""

    def __init__(self, made: Made, count: int):
        starts, hidden, _, _, _, upper = made.of(0, count)
        self.out, self.upper, self.layer = (torch.empty_like(upper) for _ in range(3))
        self.read, self.inner, self.curved, self.hidden, self.lower = (torch.empty_like(hidden) for _ in range(5))
        self.ends = torch.empty_like(starts)


class Prepared:
    """A call's groups, their launches, and the programs that have arrived at each of them (zeros)."""

    def __init__(self, q: Tensor, v: Tensor, mask, factor, gamma, slots: int, form: Form, mixed: bool):
        if q.is_cuda:
            prepare()
        (N, T, H, dk), (HV, dv), device = q.shape, v.shape[2:], q.get_device()
        self.T, self.batches = T, T // form.size
        self.count = group_of(self.batches, N * HV, form.hidden, device)
        self.groups = groups(N * HV, self.batches, self.count, heads_at_once(form.hidden, device))
        given = gamma is not None, mask is not None, factor is not None, mixed
        self.kind = Kind(0, 0, H, HV, dk, dv, slots, form, *given, q.dtype, device)
        launched = 3 * sum(len(own) for own in self.groups)  # at most: a group goes forward once more, and back in two
        self.arrived = iter(q.new_zeros((launched, ceil_div(N * HV, 4) * 4), dtype=torch.int32))  # rows on 16 bytes

    def launches(self, group: Group) -> dict[str, Bound]:
        return launches(self.kind._replace(heads=group.heads, count=group.count))

    def places(self, group: Group) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As scans and as reads take them."""
        whole = self.T, self.batches, group.first
        return (*whole, group.begin, group.count), (*whole, group.heads, group.begin)


def forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, form: Form, save: bool):
    """o, the last memory, and with save the memory that every group but the first began with, [groups - 1, `row_of` first]."""
    if masks.made_of(written):
        mask, rows, written, kept = masks.forward(written, form.size, form.before)
    N, HV = v.shape[0], v.shape[2]
    call = Prepared(q, v, mask, factor, gamma, first.shape[2], form, False)
    o, last, made = torch.empty_like(v), first.new_empty((N, *first.shape[1:])), None
    checkpoints = first.new_empty((ceil_div(call.batches, call.count) - 1 if save else 0, row_of(N, first)))
    for own in call.groups:
        before = first
        for i, group in enumerate(own):
            run = call.launches(group)
            if made is None or made.size != (group.heads, group.count):
                made = Made(q, v, first, group, form)
            behind = checkpoints[i] if i < len(checkpoints) else last
            scan, read = call.places(group)
            run["advance"](
                k, v, mask, written, kept, factor, gamma, beta, before, behind, *made.of(), made.partial, next(call.arrived), *scan,
                (N if i else len(first)) * HV, form.eps, form.curvature, form.gain,
            )  # fmt: skip
            starts, hidden, _, _, lower, upper = made.of()
            run["outputs"](q, k, mask, rows, written, factor, gamma, beta, starts, hidden, lower, upper, o, *read, form.eps)
            before = behind
    return o, last, checkpoints


def backward(
    do, dlast, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form, mixed: bool = True
):  # fmt: skip
    """Of q, k, v, mask, rows, written, kept (if mixed), factor, gamma, beta and first; None for what was not given."""
    numbers = written if masks.made_of(written) else None
    if numbers is not None:
        mask, rows, written, kept = masks.forward(numbers, form.size, form.before)
    mixed = kept is not None and (mixed or numbers is not None)
    call = Prepared(q, v, mask, factor, gamma, first.shape[2], form, mixed)
    (N, T, H, dk), (HV, dv), M = q.shape, v.shape[2:], call.batches
    dq, dk_ = (q.new_empty(N, T, HV, dk) for _ in range(2))
    dv_, dmemory = torch.empty_like(v), first.new_zeros((N, *first.shape[1:])) if dlast is None else dlast.clone()
    drows, dwritten, dkept = (None if x is None else torch.empty_like(x) for x in (rows, written, kept if mixed else None))
    dmask = torch.empty_like(mask) if mask is not None and numbers is None else mask  # the one made here nobody asks for again
    dgamma, dbeta = (None if gamma is None else q.new_empty(N, M, HV, dv, dtype=torch.float32) for _ in range(2))
    dfactor = None if factor is None else q.new_empty(N, M, HV, form.size, dtype=torch.float32)
    through_groups(
        call, do, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form,
        dq, dk_, dv_, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory,
    )  # fmt: skip
    if numbers is not None:
        dwritten = masks.backward(dmask, drows, dwritten, dkept, numbers, form.size, form.before)
        dmask = drows = dkept = None
    if len(first) < N:
        dmemory = dmemory.sum(0, keepdim=True)
    dfactor, dgamma, dbeta = (None if x is None else x.sum((0, 1)) for x in (dfactor, dgamma, dbeta))
    if HV != H:
        dq, dk_ = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dk_))
    return dq, dk_, dv_, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory


def through_groups(
    call: Prepared, do, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form,
    dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory,
) -> None:  # fmt: skip
    """The launches of backward. What is made for a group is gone behind them."""
    N, HV, loss, made = v.shape[0], v.shape[2], (form.curvature, form.gain), None
    for own in call.groups:
        for i, group in reversed(list(enumerate(own))):
            if made is None or made.size != (group.heads, group.count):
                made = Made(q, v, first, group, form)
                at_once = made.back_at_once()
                back = Back(made, at_once)
            before = checkpoints[i - 1] if i else first
            scan, _ = call.places(group)
            call.launches(group)["advance once more"](
                k, v, mask, written, kept, factor, gamma, beta, before, None, *made.of(), made.partial, next(call.arrived), *scan,
                (N if i else len(first)) * HV, form.eps, *loss,
            )  # fmt: skip
            for begin in reversed(range(0, group.count, at_once)):
                some = group._replace(begin=group.begin + begin, count=min(at_once, group.count - begin))
                run, (scan, read) = call.launches(some), call.places(some)
                starts, hidden, slopes, predicted, lower, upper = made.of(begin, begin + some.count)
                run["readers"](
                    q, k, mask, rows, written, factor, gamma, beta, starts, hidden, lower, upper, do, back.out, back.read, back.inner,
                    dq, drows, dgamma, dbeta, *read, form.eps,
                )  # fmt: skip
                run["writers"](
                    q, k, mask, written, factor, starts, hidden, lower, upper, back.out, back.read, back.inner, back.curved, dk,
                    back.hidden, back.lower, back.upper, dmask, dwritten, dfactor, *read,
                )  # fmt: skip
                run["retreat"](
                    q, k, v, mask, rows, written, kept, factor, gamma, beta, starts, hidden, slopes, back.curved, predicted, upper,
                    back.out, back.read, back.inner, back.hidden, back.lower, back.upper, dmemory, back.ends, back.layer, dv, dgamma,
                    dbeta, made.partial, next(call.arrived), *scan, form.eps, *loss,
                )  # fmt: skip
                run["written_gradient"](
                    k, mask, written, factor, starts, hidden, lower, upper, back.ends, back.hidden, dv, dk, dwritten, dkept, dfactor,
                    *read, form.curvature / form.gain,
                )  # fmt: skip
