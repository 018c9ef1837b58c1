"""path='triton' for optimizers with one slot beside the weights: the ten numbers a token that they are, and the states."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

from ....constant import constant
from ....inner_optim import Optimizer, Signals
from ....lowering import check_superposition
from ....state import State
from ... import normalizer
from ...arguments import Call, gate_decay
from ...padded import initial
from ..eligible import Plan
from ..signals import signals_of, taken_step
from .op import two_slots


def run(call: Call, dtype: torch.dtype, plan: Plan, cu_seqlens: Tensor | None, n: int) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the states after the last token of n sequences. dtype: the widest of q, k and v."""
    v, spec, (B, T, _, Hv, dk, dv) = call.v, call.spec, call.sizes
    state = None
    if call.initial_state is not None or not (plan.zero and slots_start_at_zero(spec.optimizer)) or T == 0 or n == 0:
        params = {name: p.float() for name, p in call.params.items()}
        state = initial(call.initial_state, spec, params, n, Hv, dk, dv, torch.float32, v.device)
        if T == 0 or n == 0:
            return v.new_zeros(B, T, Hv, dv), state
        state = normalizer.join(state) if plan.pad else state
    q, k, wide = (x if x.dtype == dtype else x.to(dtype) for x in (call.q, call.k, v))
    first = None
    if state is not None:
        first = torch.stack([state.weights["W"], *(state.slots[slot]["W"] for slot in spec.optimizer.slots)], 2)
    if plan.pad:  # the normaliser's ones, and zeros up to the kernels' multiple of 16
        ones = pad(wide.new_ones(1), (0, plan.pad - 1)).expand(B, T, Hv, plan.pad)
        wide = torch.cat([wide, ones], -1)
        first = None if first is None else pad(first, (0, plan.pad - 1))
    signals = signals_of(call)
    if plan.curvature is not None:
        signals["step"] = taken_step(call, plan.curvature)
    with torch.autocast(v.device.type, enabled=False):
        numbers = numbers_of(call, plan.factor, signals)
    o, last = two_slots(
        q.contiguous(), k.contiguous(), wide.contiguous(), numbers, first, cu_seqlens, call.scale, plan.erase, plan.read_before
    )
    normalized = spec.read.normalizer != "none"
    weight, *slots = ({"W": x[..., : dv + normalized]} for x in last.unbind(2))
    state = State(weights=weight, slots=dict(zip(spec.optimizer.slots, slots, strict=True)), spec_hash=spec.hash)
    if normalized:
        o, state = normalizer.normalize(o[..., : dv + 1].float(), spec.read), normalizer.split(state)
    return o if o.dtype == v.dtype else o.to(v.dtype), state


def numbers_of(call: Call, factor: float, signals: dict[str, Tensor]) -> Tensor:
    """[10, B, T, Hv], in the order of `op`: the optimizer's own functions on unit vectors, which lie on the first axis.

    The last one is the gradient: what is written is -factor times it (here of an error with its sign turned). An optimizer
    without a slot has four numbers in that order.
    """
    spec, optimizer, (B, T, _, Hv, _, _) = call.spec, call.spec.optimizer, call.sizes
    check_superposition(optimizer)
    *z, g = units(1 + len(optimizer.slots), factor, call.v.device)
    decay = gate_decay(signals, call, torch.float32)
    decayed = z
    if decay is not None:
        keep = decay.float().exp()
        decayed = [x * keep if forgets else x for x, forgets in zip(z, optimizer.decayed_slots(), strict=True)]
    s = Signals({name: x for name, x in signals.items() if name not in call.facts.gate_signals})
    rows = optimizer.update(tuple(decayed), g, s)
    seen = optimizer.point(tuple(decayed if spec.gate.order == "first" else z), s), optimizer.read(tuple(z), s)
    n = 1 + len(z)
    return torch.cat([x.expand(n, B, T, Hv) for x in rows] + [x.expand(n, B, T, Hv)[:-1] for x in seen])


def units(r: int, factor: float, device: torch.device) -> list[Tensor]:
    """r + 1 of [r + 1, 1, 1, 1]: of the weights, of the slots and of the gradient."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _units(r, factor, device)  # what a graph fills is empty until it is replayed
    return _kept_units(r, factor, device)


def _units(r: int, factor: float, device: torch.device) -> list[Tensor]:
    eye = torch.eye(r + 1, dtype=torch.float32, device=device)[..., None, None, None]
    return [*eye[:r], eye[r] * -factor]


@lru_cache(maxsize=64)
def _kept_units(r: int, factor: float, device: torch.device) -> list[Tensor]:
    with _disable_current_modes(), torch.inference_mode(False):
        return _units(r, factor, device)


@constant
def slots_start_at_zero(optimizer: Optimizer) -> bool:
    """Where the weights do."""
    return not any(bool(x.any()) for x in optimizer.init_slots(torch.zeros(2, 2)))
