"""One call, forward and backward: some sequences after others, of those some heads and some mini-batches (`groups`) after others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mini_batch import masks
from ..shapes import ceil_div
from .groups import Back, Form, Made, Prepared
from .parts import group_of, heads_at_once, row_of


def forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, form: Form, save: bool):
    """o, the last memory, and with save the memory that every group but the first began with, [groups - 1, `row_of` first]."""
    count = count_of(v, form)
    o, last = torch.empty_like(v), first.new_empty((len(v), *first.shape[1:]))
    checkpoints = first.new_empty((ceil_div(v.shape[1] // form.size, count) - 1 if save else 0, row_of(len(v), first)))
    for some in sequences(v, form, (mask, rows, written, kept, last)):
        tokens, pairs = [part(x, some) for x in (q, k, v)], pairs_of(some, form, mask, rows, written, kept)
        memory = began(some, first, len(v)), rows_of(some, checkpoints, first)
        forth(*tokens, pairs, factor, gamma, beta, *memory, form, count, part(o, some), part(last, some))
    return o, last, checkpoints


def backward(
    do, dlast, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form, mixed: bool = True
):  # fmt: skip
    """Of q, k, v, mask, rows, written, kept (if mixed), factor, gamma, beta and first; None for what was not given."""
    (N, T, H, dk), HV, count, alike = q.shape, v.shape[2], count_of(v, form), len(first) < len(v)
    dq, dk_ = (q.new_empty(N, T, HV, dk) for _ in range(2))
    dv, dmemory = torch.empty_like(v), None
    if not alike:
        dmemory = torch.zeros_like(first) if dlast is None else dlast.clone()
    made, dfirst = [], []
    for some in sequences(v, form, (mask, rows, written, kept, first if alike else dmemory)):
        tokens, pairs = [part(x, some) for x in (q, k, v)], pairs_of(some, form, mask, rows, written, kept)
        memory = began(some, first, N), rows_of(some, checkpoints, first)
        back = part(dmemory, some)
        if back is None:
            back = first.new_zeros((len(tokens[0]), *first.shape[1:])) if dlast is None else part(dlast, some).clone()
        gradients = (part(x, some) for x in (dq, dk_, dv))
        made.append(through_back(part(do, some), *tokens, pairs, factor, gamma, beta, *memory, form, count, mixed, *gradients, back))
        if alike:
            dfirst.append(back.sum(0, keepdim=True))
    axis = 1 if masks.made_of(written) else 0
    of_sequences, of_all = [x[:4] for x in made], [x[4:] for x in made]
    dmask, drows, dwritten, dkept = (x[0] if x[0] is None or len(x) == 1 else torch.cat(x, axis) for x in zip(*of_sequences, strict=True))
    dfactor, dgamma, dbeta = (None if x[0] is None else reduce(torch.add, x) for x in zip(*of_all, strict=True))
    if HV != H:
        dq, dk_ = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dk_))
    dmemory = reduce(torch.add, dfirst) if alike else dmemory
    return dq, dk_, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory


def count_of(v: Tensor, form: Form) -> int:
    """Mini-batches of a group."""
    return group_of(v.shape[1] // form.size, v.shape[0] * v.shape[2], form.hidden, v.get_device())


def sequences(v: Tensor, form: Form, given: Sequence[Tensor | None]) -> list[slice | None]:
    """Which run after others, where not all run at once and whole ones take no longer so: what is made of their pairs is then smaller.

    None: all of them. given: what has sequences first, or one for all; each slice of it has to begin on 16 bytes.
    """
    N, HV = v.shape[0], v.shape[2]
    at_once = heads_at_once(form.hidden, v.get_device())
    each = ceil_div(N, ceil_div(N * HV, at_once))
    if each == N or each * HV > at_once or any(x is not None and x[0].nbytes % 16 for x in given):
        return [None]
    return [slice(begin, begin + each) for begin in range(0, N, each)]


def part(x: Any, some: slice | None) -> Any:
    return x if x is None or some is None else x[some]


def began(some: slice | None, first: Tensor, N: int) -> Tensor:
    """The memory that some of N sequences begin with."""
    return first if len(first) < N else part(first, some)


def rows_of(some: slice | None, checkpoints: Tensor, first: Tensor) -> Tensor:
    """The checkpoints of some sequences."""
    if some is None:
        return checkpoints
    one = first[0].numel()
    return checkpoints[:, some.start * one : some.stop * one]


class Pairs(NamedTuple):
    """What the tokens of some sequences do to each other. numbers: what it was made of here, else None."""

    mask: Tensor | None
    rows: Tensor | None
    written: Tensor
    kept: Tensor | None
    numbers: Tensor | None


def pairs_of(some: slice | None, form: Form, mask, rows, written, kept) -> Pairs:
    if masks.made_of(written):
        numbers = written if some is None else written[:, some].contiguous()
        return Pairs(*masks.forward(numbers, form.size, form.before), numbers)
    return Pairs(part(mask, some), part(rows, some), part(written, some), part(kept, some), None)


def forth(q, k, v, pairs: Pairs, factor, gamma, beta, first, checkpoints, form: Form, count: int, o, last) -> None:
    """Of some sequences: o, the last memory and the checkpoints."""
    mask, rows, written, kept, _ = pairs
    call, made = Prepared(q, v, mask, factor, gamma, first.shape[2], form, count, False), None
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
                (len(v) if i else len(first)) * v.shape[2], form.eps, form.curvature, form.gain,
            )  # fmt: skip
            starts, hidden, _, _, lower, upper = made.of()
            run["outputs"](q, k, mask, rows, written, factor, gamma, beta, starts, hidden, lower, upper, o, *read, form.eps)
            before = behind


def through_back(
    do, q, k, v, pairs: Pairs, factor, gamma, beta, first, checkpoints, form: Form, count: int, mixed: bool, dq, dk, dv, dmemory,
):  # fmt: skip
    """Of some sequences: dq, dk, dv; dmemory, of the last memory, becomes that of the first. Gives back those of mask, rows, written
    or the numbers, kept, factor, gamma and beta."""
    mask, rows, written, kept, numbers = pairs
    mixed = kept is not None and (mixed or numbers is not None)
    call = Prepared(q, v, mask, factor, gamma, first.shape[2], form, count, mixed)
    (N, _, HV, dv_), M = v.shape, call.batches
    drows, dwritten, dkept = (None if x is None else torch.empty_like(x) for x in (rows, written, kept if mixed else None))
    dmask = torch.empty_like(mask) if mask is not None and numbers is None else mask  # the one made here nobody asks for again
    dgamma, dbeta = (None if gamma is None else q.new_empty(N, M, HV, dv_, dtype=torch.float32) for _ in range(2))
    dfactor = None if factor is None else q.new_empty(N, M, HV, form.size, dtype=torch.float32)
    through_groups(
        call, do, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form,
        dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory,
    )  # fmt: skip
    if numbers is not None:
        dwritten = masks.backward(dmask, drows, dwritten, dkept, numbers, form.size, form.before)
        dmask = drows = dkept = None
    return dmask, drows, dwritten, dkept, *(None if x is None else x.sum((0, 1)) for x in (dfactor, dgamma, dbeta))


def through_groups(
    call: Prepared, do, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form,
    dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory,
) -> None:  # fmt: skip
    """The launches of backward. What is made for a group is gone behind them."""
    loss, made = (form.curvature, form.gain), None
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
                (len(v) if i else len(first)) * v.shape[2], form.eps, *loss,
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
