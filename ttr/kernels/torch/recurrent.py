"""The canonical recurrence one event at a time: decoding, and the reading of every linear spec that has no chunk form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lowering import LinearRecurrence, lower
from ...state import State
from ..problem import Problem


def stack_slots(state: State, slots: tuple[str, ...]) -> Tensor:
    """z: [r, N, H, dk, dv], the weights first."""
    return torch.stack([state.weights["W"], *(state.slots[slot]["W"] for slot in slots)])


def unstack_slots(z: Tensor, problem: Problem) -> State:
    slots = {slot: {"W": z[i + 1]} for i, slot in enumerate(problem.spec.optimizer.slots)}
    return State(weights={"W": z[0]}, slots=slots, spec_hash=problem.spec.hash)


def recurrent(problem: Problem) -> tuple[Tensor, State]:
    """O(T n) sequential steps, O(dk dv) memory a head between them."""
    rec = lower(problem)
    z = stack_slots(problem.state, problem.spec.optimizer.slots)
    outputs = []
    A, b, c, read = (t.unbind(dim) for t, dim in ((rec.A, 4), (rec.b, 3), (rec.c, 3), (rec.read, 3)))
    for t in range(problem.q.shape[2]):
        if rec.read_before:
            outputs.append(_read(problem.q[:, :, t], read[t], z))
        for j in range(problem.k.shape[3]):
            z = _event(rec, A[t][:, :, :, :, j], b[t][:, :, :, j], c[t][:, :, :, j], z, t, j)
        if not rec.read_before:
            outputs.append(_read(problem.q[:, :, t], read[t], z))
    return torch.stack(outputs, 2), unstack_slots(z, problem)


def _read(q: Tensor, row: Tensor, z: Tensor) -> Tensor:
    """q: [N, H, dk], row: [r, N, H, d1, d2] -> [N, H, dv]."""
    return torch.einsum("nhk,nhkv->nhv", q, (row * z).sum(0))


def _event(rec: LinearRecurrence, A: Tensor, b: Tensor, c: Tensor, z: Tensor, t: int, j: int) -> Tensor:
    x = rec.k[:, :, t, j]
    error = torch.einsum("nhk,nhkv->nhv", x, (c * z).sum(0)) if rec.solve else z.new_zeros(*z.shape[1:3], z.shape[-1])
    if rec.v is not None:
        error = error - rec.v[:, :, t, j]
    z = (A * z[None]).sum(1) + b * (x[..., :, None] * error[..., None, :])
    if rec.known is not None:
        b_known, k, v = (rec.known[0][:, :, :, t, j], rec.known[1][:, :, t, j], rec.known[2][:, :, t, j])
        z = z + b_known * (k[..., :, None] * v[..., None, :])
    return z
