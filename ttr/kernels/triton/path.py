"""path='triton': a checked call in the caller's own layout, [B, T, H, d], to the operators and back.

q, k and v of different dtypes run in the widest of them; o comes in v's dtype, the state in float32. Nothing here waits
for the device or copies to it (`mini_batch` does, for packed sequences and for states): what follows from the declaration
alone is brought there once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...state import State
from .. import normalizer, padded
from ..arguments import Call
from .eligible import Plan, plan_of, why_not_chunks
from .least_squares import path as least_squares
from .mini_batch import path as mini_batch
from .packed import packed
from .recurrent import path as recurrent
from .scalar_gate.op import scalar_gate
from .signals import as_numbers, decay_of, weight_of
from .two_slots import path as two_slots
from .vector_gate import path as vector_gate


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token. dtype: the widest of q, k and v."""
    if call.spec.regressor.family == "least_squares":
        return least_squares.run(call, dtype)
    if call.spec.mini_batch != 1:
        return mini_batch.run(call, dtype)
    if why_not_chunks(call.spec) is not None:
        return recurrent.run(call, dtype)
    if call.facts.steps > 1:
        call = _with_micro_steps(call)
    v, spec, facts, (B, T, _, Hv, dk, dv) = call.v, call.spec, call.facts, call.sizes
    plan, cu_seqlens, device = plan_of(spec, dv), call.cu_seqlens, v.device
    n = B
    if cu_seqlens is not None:
        cu_seqlens, n = packed(cu_seqlens, B, T, device), len(cu_seqlens) - 1
    if spec.optimizer.slots:
        return two_slots.run(call, dtype, plan, cu_seqlens, n)
    start = _start(call, plan, n)
    if T == 0 or n == 0:
        return v.new_zeros(B, T, Hv, dv), padded.initial(call.initial_state, spec, call.params, n, Hv, dk, dv, torch.float32, device)
    q, k, wide = (x if x.dtype == dtype else x.to(dtype) for x in (call.q, call.k, v))
    if plan.pad:  # the normaliser's ones, and zeros up to the kernels' multiple of 16
        ones = torch.nn.functional.pad(wide.new_ones(1), (0, plan.pad - 1)).expand(*wide.shape[:-1], plan.pad)
        wide = torch.cat([wide, ones], -1)
        start = None if start is None else torch.nn.functional.pad(start, (0, plan.pad - 1))
    kernels = vector_gate.run if plan.by_channel else _by_head
    o, last = kernels(call, plan, q, k, wide, start, cu_seqlens)
    if not plan.pad:
        return o if o.dtype == v.dtype else o.to(v.dtype), State(weights={"W": last}, spec_hash=facts.hash)
    o = normalizer.normalize(o[..., : dv + 1].float(), spec.read).to(v.dtype)
    return o, State(weights={"W": last[..., :dv], "normalizer": last[..., dv : dv + 1]}, spec_hash=facts.hash)


def _with_micro_steps(call: Call) -> Call:
    """k, v and a step per token with an axis of micro-steps after T: what comes without one repeats."""

    def repeated(x: Tensor, axes: int) -> Tensor:
        return x if x.ndim == axes else x[:, :, None].expand(-1, -1, call.facts.steps, *[-1] * (axes - 3))

    step = call.signals["step"]
    if isinstance(step, Tensor) and step.ndim:
        step = repeated(step, 4)
    return call._replace(k=repeated(call.k, 5), v=repeated(call.v, 5), signals=call.signals | {"step": step})


def _by_head(
    call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o and the last state, with one decay and one step a head."""
    Hv = call.sizes[3]
    log_decay, weight = as_numbers(decay_of(call), Hv), as_numbers(weight_of(call, plan), Hv)
    return scalar_gate(
        q.contiguous(), k.contiguous(), v.contiguous(), log_decay, weight,
        start, cu_seqlens, call.scale, plan.erase, plan.look_before, plan.read_before,
    )  # fmt: skip


def _start(call: Call, plan: Plan, n: int) -> Tensor | None:
    """[N, Hv, dk, dv], with a normaliser [N, Hv, dk, dv + 1]; None: zeros."""
    given, spec, (_, _, _, Hv, dk, dv) = call.initial_state, call.spec, call.sizes
    if given is None and plan.zero:
        return None
    if not plan.pad and isinstance(given, State) and _fits(given, call.facts.hash, (n, Hv, dk, dv), call.q.device):
        return given.weights["W"].float().contiguous()
    params = {name: p.float() for name, p in call.params.items()}
    state = padded.initial(given, spec, params, n, Hv, dk, dv, torch.float32, call.q.device)
    if plan.pad:
        state = normalizer.join(state)
    return state.weights["W"].contiguous()


def _fits(given: State, spec_hash: str, shape: tuple[int, ...], device: torch.device) -> bool:
    """The usual State, recognised without building another to compare with."""
    if given.spec_hash != spec_hash or given.weights.keys() != {"W"} or given.slots or given.mini_batch:
        return False
    W = given.weights["W"]
    return W.shape == shape and W.device == device
