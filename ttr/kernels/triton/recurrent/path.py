"""path='triton' for a linear recurrence that no kernel over chunks serves: lowered as the torch paths lower it, then scanned."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....lowering import lower
from ....state import State
from ... import normalizer, padded
from ...arguments import Call
from ...problem import Problem
from ...torch.recurrent import stack_slots, unstack_slots
from ..packed import packed
from ..shapes import power_of_two
from .op import scan


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token; computed in float32. dtype: the widest of q, k and v."""
    (B, T, _, Hv, dk, dv), spec, bounds = call.sizes, call.spec, call.cu_seqlens
    if bounds is None or T == 0:
        return padded.run(call, dtype, partial(_scan, None, None), {})
    bounds, params = packed(bounds, B, T, call.q.device), {name: p.float() for name, p in call.params.items()}
    state = padded.initial(call.initial_state, spec, params, bounds.shape[0] - 1, Hv, dk, dv, torch.float32, call.q.device)
    if spec.read.normalizer != "none":
        state = normalizer.join(state)
    # as one sequence: a program finds its own in it
    return padded.run(call._replace(cu_seqlens=None, initial_state=None), dtype, partial(_scan, state, bounds), {})


def _scan(state: State | None, cu_seqlens: Tensor | None, problem: Problem) -> tuple[Tensor, State]:
    """(o [N, H, T, dv], state) of a problem in float32. state: of the packed sequences; None: the problem's own."""
    rec, (N, H) = lower(problem), problem.q.shape[:2]
    first = stack_slots(problem.state if state is None else state, problem.spec.optimizer.slots)
    more = power_of_two(rec.r) - rec.r  # slots that stay zero

    def rows(x: Tensor | None, axis: int = 0) -> Tensor | None:
        """N and H as one axis."""
        return None if x is None else x.flatten(axis, axis + 1)

    def slots(x: Tensor | None, axes: int = 1) -> Tensor | None:
        """The same behind `axes` of slots."""
        if x is None:
            return None
        return rows(pad(x, (0, 0) * (x.ndim - axes) + (0, more) * axes) if more else x, axes)

    known, key, value = rec.known or (None, None, None)
    o, last = scan(
        rows(problem.q), rows(rec.k), rows(rec.v), slots(rec.A, 2), slots(rec.b), slots(rec.c if rec.solve else None), slots(rec.read),
        slots(known), rows(key), rows(value), slots(first), cu_seqlens, rec.solve, rec.read_before, H,
    )  # fmt: skip
    return o.unflatten(0, (N, H)), unstack_slots(last[: rec.r].unflatten(1, (-1, H)), problem)
