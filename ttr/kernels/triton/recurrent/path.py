"""path='triton' for a linear recurrence that no kernel over chunks serves: lowered as the torch paths lower it, then scanned."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from ....lowering import lower
from ....state import State
from ...problem import Problem
from ...torch.recurrent import stack_slots, unstack_slots
from ..shapes import power_of_two
from .op import scan


def recurrent(problem: Problem) -> tuple[Tensor, State]:
    """(o [N, H, T, dv], state) of a problem in float32."""
    rec = lower(problem)
    N, H = problem.q.shape[:2]
    first = stack_slots(problem.state, problem.spec.optimizer.slots)
    more = power_of_two(rec.r) - rec.r  # slots that stay zero

    def heads(x: Tensor | None, axis: int = 0) -> Tensor | None:
        """N and H as one axis."""
        return None if x is None else x.flatten(axis, axis + 1)

    def slots(x: Tensor | None, axes: int = 1) -> Tensor | None:
        """The same behind `axes` of slots."""
        if x is None:
            return None
        return heads(pad(x, (0, 0) * (x.ndim - axes) + (0, more) * axes) if more else x, axes)

    known, key, value = rec.known or (None, None, None)
    x, c = (rec.x, rec.c) if rec.solve else (None, None)
    o, last = scan(
        heads(problem.q), heads(x), heads(rec.w), heads(rec.v), slots(rec.A, 2), slots(rec.b), slots(c), slots(rec.read), slots(known),
        heads(key), heads(value), slots(first), rec.solve, rec.read_before,
    )  # fmt: skip
    return o.unflatten(0, (N, H)), unstack_slots(last[: rec.r].unflatten(1, (N, H)), problem)
