"""The launches of one call, forward and backward, a group of mini-batches after another."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import Bound, prepare
from ..shapes import power_of_two
from .advance import advance_kernel
from .outputs import outputs_kernel
from .readers import readers_kernel
from .retreat import retreat_kernel
from .writers import writers_kernel
from .written_gradient import written_gradient_kernel

READS = {"outputs": outputs_kernel, "readers": readers_kernel, "writers": writers_kernel}


class Form(NamedTuple):
    """Tokens of a mini-batch, mini-batches of a group, hidden units, the layers and the loss, who reads when.

    f(x) = [x +] [LN](a(x Z + c) Y + d),    dl/df = curvature f - gain v
    """

    size: int
    group: int
    hidden: int
    biased: bool
    activation: str
    residual: bool
    eps: float
    curvature: float
    gain: float
    before: bool

    def groups(self, T: int) -> list[tuple[int, int]]:
        """(first, how many) mini-batches of every group."""
        batches = T // self.size
        return [(begin, min(self.group, batches - begin)) for begin in range(0, batches, self.group)]


class Kind(NamedTuple):
    """All that decides the launches of a group."""

    N: int
    H: int
    HV: int
    dk: int
    dv: int
    count: int
    slots: int
    form: Form
    norm: bool
    masked: bool  # these three and the norms: which arguments are None
    factored: bool
    mixed: bool
    dtype: torch.dtype
    device: int


def kind_of(q, v, count: int, slots: int, mask, factor, gamma, form: Form, mixed: bool) -> Kind:
    (N, _, H, dk), (HV, dv) = q.shape, v.shape[2:]
    given = gamma is not None, mask is not None, factor is not None
    return Kind(N, H, HV, dk, dv, count, slots, form, *given, mixed, q.dtype, q.get_device())


@lru_cache(maxsize=1024)
def launches(kind: Kind) -> dict[str, Bound]:
    form, d = kind.form, max(kind.dk, kind.dv)
    constants: dict[str, Any] = {
        "H": kind.H, "HV": kind.HV, "DK": kind.dk, "DV": kind.dv, "M": form.hidden, "BK": power_of_two(kind.dk),
        "BV": power_of_two(kind.dv), "BM": 64 if d <= 64 and kind.dtype.itemsize == 2 else 32, "SIZE": form.size,
        "ROWS": max(16, power_of_two(form.size)), "SLOTS": kind.slots, "BIASED": form.biased, "NORM": kind.norm,
        "RESIDUAL": form.residual, "ACTIVATION": form.activation, "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    heads, batches, warps = (kind.N * kind.HV,), (kind.N * kind.count, kind.HV), 4 if constants["ROWS"] < 64 and d <= 64 else 8
    out = {name: kernel.bind(batches, warps, **constants, BEFORE=form.before) for name, kernel in READS.items()}
    out["written_gradient"] = written_gradient_kernel.bind(batches, warps, **constants)
    out["advance"] = advance_kernel.bind(heads, warps, **constants, STAGES=1)
    # a tile half as wide: two gradients of it are in the registers beside what it came of
    out["retreat"] = retreat_kernel.bind(heads, warps, **constants | {"BM": 32, "STAGES": 1})
    return out


class Group:
    """What is made anew for every group: the memory before each of its mini-batches, and X, L, U of its tokens."""

    def __init__(self, q: Tensor, v: Tensor, memory: Tensor, count: int, form: Form):
        (N, _, HV, dv), (slots, wide) = v.shape, memory.shape[2:]
        self.starts = q.new_empty(N, count, HV, slots, wide)
        self.hidden, self.lower = (q.new_empty(N, count * form.size, HV, form.hidden) for _ in range(2))
        self.upper = q.new_empty(N, count * form.size, HV, dv)


def forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, form: Form, save: bool):
    """o, the last memory, and with save the memory that every group but the first began with, [groups - 1, N, Hv, r, slot]."""
    if q.is_cuda:
        prepare()
    T, M = v.shape[1], v.shape[1] // form.size
    parts = form.groups(T)
    o, memory, group = torch.empty_like(v), first.clone(), None
    checkpoints = first.new_empty((len(parts) - 1 if save else 0, *first.shape))
    for i, (begin, count) in enumerate(parts):
        run = launches(kind_of(q, v, count, first.shape[2], mask, factor, gamma, form, False))
        if group is None or count != parts[0][1]:
            group = Group(q, v, first, count, form)
        if save and i:
            checkpoints[i - 1].copy_(memory)
        made = group.starts, group.hidden, group.lower, group.upper
        place = T, M, begin, count, form.eps
        run["advance"](k, v, mask, written, kept, factor, gamma, beta, memory, *made, *place, form.curvature, form.gain)
        run["outputs"](q, k, mask, rows, written, factor, gamma, beta, *made, o, *place)
    return o, memory, checkpoints


def backward(
    do, dlast, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form, mixed: bool = True
):  # fmt: skip
    """Of q, k, v, mask, rows, written, kept (if mixed), factor, gamma, beta and first; None for what was not given."""
    if q.is_cuda:
        prepare()
    mixed = mixed and kept is not None
    (N, T, H, dk), (HV, dv), M = q.shape, v.shape[2:], v.shape[1] // form.size
    dq, dk_ = (q.new_empty(N, T, HV, dk) for _ in range(2))
    dv_, dmemory = torch.empty_like(v), dlast.clone()
    dmask, drows, dwritten = (None if x is None else torch.empty_like(x) for x in (mask, rows, written))
    dkept = torch.empty_like(kept) if mixed else None
    dgamma, dbeta = (None if gamma is None else q.new_empty(N, M, HV, dv, dtype=torch.float32) for _ in range(2))
    dfactor = None if factor is None else q.new_empty(N, M, HV, form.size, dtype=torch.float32)
    affine, group, parts = (gamma, beta), None, form.groups(T)
    for i, (begin, count) in reversed(list(enumerate(parts))):
        run = launches(kind_of(q, v, count, first.shape[2], mask, factor, gamma, form, mixed))
        if group is None or count != group.starts.shape[1]:
            group = Group(q, v, first, count, form)
            dout, dupper, dlayer = (torch.empty_like(group.upper) for _ in range(3))
            read, dinner, dhidden, dlower, dweighed = (torch.empty_like(group.hidden) for _ in range(5))
            ends = torch.empty_like(group.starts)
        memory = (checkpoints[i - 1] if i else first).clone()
        starts, hidden, lower, upper = group.starts, group.hidden, group.lower, group.upper
        place, slopes = (T, M, begin, count), (form.curvature, form.gain)
        run["advance"](
            k, v, mask, written, kept, factor, *affine, memory, starts, hidden, lower, upper, *place, form.eps, *slopes
        )  # fmt: skip
        run["readers"](
            q, k, mask, rows, written, factor, *affine, starts, hidden, lower, upper, do, dout, read, dinner, dq, drows, dgamma, dbeta,
            *place, form.eps,
        )  # fmt: skip
        run["writers"](
            q, k, mask, written, factor, hidden, lower, upper, dout, read, dinner, dk_, dhidden, dlower, dupper, dmask, dwritten,
            dfactor, *place,
        )  # fmt: skip
        run["retreat"](
            q, k, v, mask, rows, written, kept, factor, *affine, starts, hidden, upper, dout, read, dinner, dhidden, dlower, dupper,
            dmemory, ends, dweighed, dlayer, dv_, dgamma, dbeta, *place, form.eps, *slopes,
        )  # fmt: skip
        run["written_gradient"](
            k, mask, written, factor, starts, hidden, lower, upper, ends, dhidden, dv_, dk_, dwritten, dkept, dfactor,
            *place, form.curvature / form.gain,
        )  # fmt: skip
    dfactor, dgamma, dbeta = (None if x is None else x.sum((0, 1)) for x in (dfactor, dgamma, dbeta))
    if HV != H:
        dq, dk_ = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dk_))
    return dq, dk_, dv_, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory
