"""One call, forward and backward: some sequences after others, of those some heads and some mini-batches (`groups`) after others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mini_batch import masks
from ..shapes import ceil_div
from .groups import Back, Form, Group, Made, Prepared
from .parts import group_of, heads_at_once, row_of


def forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, form: Form, save: bool):
    """o, the last memory, and with save the memory that every group but the first began with, [groups - 1, `row_of` first]."""
    count, given = count_of(v, form), (q, k, v, mask, rows, written, kept, factor, gamma, beta, first)
    o, last = torch.empty_like(v), first.new_empty((len(v), *first.shape[1:]))
    checkpoints = first.new_empty((ceil_div(v.shape[1] // form.size, count) - 1 if save else 0, row_of(len(v), first)))
    for some in sequences(v, form, (q, v, mask, rows, written, kept, last)):
        forth(own_of(some, *given, checkpoints, form), form, count, part(o, some), part(last, some))
    return o, last, checkpoints


def backward(
    do, dlast, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form, mixed: bool = True
):  # fmt: skip
    """Of q, k, v, mask, rows, written, kept, factor, gamma, beta and first; None for what was not given.

    mixed: whether that of kept is wanted, and of the numbers, if they were given.
    """
    (N, T, H, dk), HV, count, alike = q.shape, v.shape[2], count_of(v, form), len(first) < len(v)
    given = q, k, v, mask, rows, written, kept, factor, gamma, beta, first
    dq, dk_ = (q.new_empty(N, T, HV, dk) for _ in range(2))
    dv, dmemory = torch.empty_like(v), None
    if not alike:
        dmemory = torch.zeros_like(first) if dlast is None else dlast.clone()
    made, dfirst = [], []
    for some in sequences(v, form, (q, v, mask, rows, written, kept, first if alike else dmemory)):
        back, dv_ = part(dmemory, some), part(dv, some)
        if back is None:
            back = first.new_zeros((len(dv_), *first.shape[1:])) if dlast is None else part(dlast, some).clone()
        own = own_of(some, *given, checkpoints, form)
        made.append(through_back(own, part(do, some), part(dq, some), part(dk_, some), dv_, back, form, count, mixed))
        del own  # before the next one's masks
        if alike:
            dfirst.append(back.sum(0, keepdim=True))
    axis = 1 if masks.are_numbers(written) else 0
    *of_sequences, dfactor, dgamma, dbeta = zip(*made, strict=True)
    dmask, drows, dwritten, dkept = (x[0] if x[0] is None or len(x) == 1 else torch.cat(x, axis) for x in of_sequences)
    dfactor, dgamma, dbeta = (None if x[0] is None else reduce(torch.add, x) for x in (dfactor, dgamma, dbeta))
    if HV != H:
        dq, dk_ = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dk_))
    return dq, dk_, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, reduce(torch.add, dfirst) if alike else dmemory


def count_of(v: Tensor, form: Form) -> int:
    """Mini-batches of a group."""
    return group_of(v.shape[1] // form.size, v.shape[0] * v.shape[2], form.hidden, v.get_device())


def sequences(v: Tensor, form: Form, given: Sequence[Tensor | None]) -> list[slice | None]:
    """Which run after others, where not all run at once and whole ones take no longer so: what is made of their pairs is then smaller.

    None: all of them. given: what is taken in slices of sequences (k and gradients as q and v), each of which has to begin on 16 bytes,
    or is one for all of them. Numbers are copied.
    """
    N, HV = v.shape[0], v.shape[2]
    at_once = heads_at_once(form.hidden, v.get_device())
    each = ceil_div(N, ceil_div(N * HV, at_once))
    if each == N or each * HV > at_once or any(x is not None and x[0].nbytes % 16 for x in given):
        return [None]
    return [slice(begin, begin + each) for begin in range(0, N, each)]


def part(x: Any, some: slice | None) -> Any:
    return x if x is None or some is None else x[some]


class Own(NamedTuple):
    """Of some sequences what a call is given. numbers: what mask, rows, written and kept were made of here, else None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    rows: Tensor | None
    written: Tensor
    kept: Tensor | None
    factor: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    first: Tensor
    checkpoints: Tensor
    numbers: Tensor | None


def own_of(some: slice | None, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, form: Form) -> Own:
    numbers = None
    if masks.are_numbers(written):
        numbers = written if some is None else written[:, some].contiguous()
        mask, rows, written, kept = masks.forward(numbers, form.size, form.before)
    else:
        mask, rows, written, kept = (part(x, some) for x in (mask, rows, written, kept))
    if some is not None:
        one = first[0].numel()
        checkpoints = checkpoints[:, some.start * one : some.stop * one]
    began = first if len(first) < len(v) else part(first, some)
    q, k, v = (part(x, some) for x in (q, k, v))
    return Own(q, k, v, mask, rows, written, kept, factor, gamma, beta, began, checkpoints, numbers)


def forth(own: Own, form: Form, count: int, o: Tensor, last: Tensor) -> None:
    """Makes o, the last memory and the checkpoints."""
    call = Prepared(own.q, own.v, own.mask, own.factor, own.gamma, own.first.shape[2], form, count, False, waiting=1)
    for groups in call.groups:
        forth_heads(call, groups, own, form, o, last)


def forth_heads(call: Prepared, groups: list[Group], own: Own, form: Form, o: Tensor, last: Tensor) -> None:
    """The launches of some heads. What is made for their groups, in turn, is gone behind them."""
    q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, _ = own
    made, before = Made(q, v, first, groups[0], form), first
    for i, group in enumerate(groups):
        run, (scan, read) = call.launches(group), call.places(group)
        all_made = starts, hidden, _, _, lower, upper = made.of(0, group.count)
        behind = checkpoints[i] if i < len(checkpoints) else last
        run["advance"](
            k, v, mask, written, kept, factor, gamma, beta, before, behind, *all_made, made.partial, next(call.arrived), *scan,
            (len(v) if i else len(first)) * v.shape[2], form.eps, form.curvature, form.gain,
        )  # fmt: skip
        run["outputs"](q, k, mask, rows, written, factor, gamma, beta, starts, hidden, lower, upper, o, *read, form.eps)
        before = behind


def through_back(own: Own, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dmemory: Tensor, form: Form, count: int, mixed: bool):
    """Makes dq, dk and dv; dmemory, of the last memory, becomes that of the first. Gives back those of mask, rows, written (of the
    numbers, if there are), kept, factor, gamma and beta."""
    q, v, numbers = own.q, own.v, own.numbers
    mixed = own.kept is not None and mixed
    call = Prepared(q, v, own.mask, own.factor, own.gamma, own.first.shape[2], form, count, mixed, waiting=3)
    (N, _, HV, width), M = v.shape, call.batches
    drows, dwritten, dkept = (None if x is None else torch.empty_like(x) for x in (own.rows, own.written, own.kept if mixed else None))
    dmask = own.mask  # which was made here and nobody asks for again, or
    if dmask is not None and numbers is None:
        dmask = torch.empty_like(dmask)
    dgamma, dbeta = (None if own.gamma is None else q.new_empty(N, M, HV, width, dtype=torch.float32) for _ in range(2))
    dfactor = None if own.factor is None else q.new_empty(N, M, HV, form.size, dtype=torch.float32)
    for groups in call.groups:
        through_heads(call, groups, own, do, form, dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dmemory)
    if numbers is not None:
        dwritten = masks.backward(dmask, drows, dwritten, dkept, numbers, form.size, form.before) if mixed else None
        dmask = drows = dkept = None
    return dmask, drows, dwritten, dkept, *(None if x is None else x.sum((0, 1)) for x in (dfactor, dgamma, dbeta))


def through_heads(
    call: Prepared, groups: list[Group], own: Own, do, form: Form, dq, dk, dv, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta,
    dmemory,
) -> None:  # fmt: skip
    """The launches of backward of some heads. What is made for their groups, in turn, is gone behind them."""
    q, k, v, mask, rows, written, kept, factor, gamma, beta, first, checkpoints, _ = own
    loss, made = (form.curvature, form.gain), Made(q, v, first, groups[0], form)
    at_once = made.back_at_once()
    back = Back(made, at_once)
    for i, group in reversed(list(enumerate(groups))):
        before = checkpoints[i - 1] if i else first
        scan, _ = call.places(group)
        call.launches(group)["advance once more"](
            k, v, mask, written, kept, factor, gamma, beta, before, None, *made.of(0, group.count), made.partial, next(call.arrived),
            *scan, (len(v) if i else len(first)) * v.shape[2], form.eps, *loss,
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
