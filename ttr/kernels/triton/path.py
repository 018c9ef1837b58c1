"""path='triton': a checked call in the caller's own layout, [B, T, H, d], to the operators and back.

q, k and v of different dtypes run in the widest of them; o comes in v's dtype, the state in float32. Nothing here waits
for the device or copies to it (`mini_batch` does, for packed sequences and for states): what follows from the declaration
alone is brought there once.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...state import State
from .. import normalizer
from ..arguments import Call, check_packed, gate_decay, sequences
from ..padded import initial
from .eligible import Plan, plan_of
from .least_squares import path as least_squares
from .mini_batch import path as mini_batch
from .scalar_gate.op import scalar_gate
from .two_slots import path as two_slots


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token. dtype: the widest of q, k and v."""
    if call.spec.regressor.family == "least_squares":
        return least_squares.run(call, dtype)
    if call.spec.mini_batch != 1:
        return mini_batch.run(call, dtype)
    if call.facts.steps > 1:
        call = _with_micro_steps(call)
    v, spec, facts, (B, T, _, Hv, dk, dv) = call.v, call.spec, call.facts, call.sizes
    plan, cu_seqlens, device = plan_of(spec, dv), call.cu_seqlens, v.device
    n = B
    if cu_seqlens is not None:
        cu_seqlens, n = _packed(cu_seqlens, B, T, device), len(cu_seqlens) - 1
    if spec.optimizer.slots:
        signals = {name: _tensor(x, Hv, device) for name, x in call.signals.items()}
        step = None if plan.curvature is None else _weight(call, plan._replace(factor=1.0))  # by the step rule
        signals |= {} if step is None else {"step": step}
        return two_slots.run(call, dtype, plan, signals, cu_seqlens, n)
    start = _start(call, plan, n)
    if T == 0 or n == 0:
        return v.new_zeros(B, T, Hv, dv), initial(call.initial_state, spec, call.params, n, Hv, dk, dv, torch.float32, device)
    q, k, wide = (x if x.dtype == dtype else x.to(dtype) for x in (call.q, call.k, v))
    if plan.pad:  # the normaliser's ones, and zeros up to the kernels' multiple of 16
        ones = torch.nn.functional.pad(wide.new_ones(1), (0, plan.pad - 1)).expand(*wide.shape[:-1], plan.pad)
        wide = torch.cat([wide, ones], -1)
        start = None if start is None else torch.nn.functional.pad(start, (0, plan.pad - 1))
    if plan.by_channel:
        from .vector_gate.path import run as run_by_channel  # which takes its numbers as this module does

        o, last = run_by_channel(call, plan, q, k, wide, start, cu_seqlens)
    else:
        o, last = _by_head(call, plan, q, k, wide, start, cu_seqlens)
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
    facts, Hv, device = call.facts, call.sizes[3], v.device
    signals = {name: _tensor(x, Hv, device) for name, x in call.signals.items() if name in facts.gate_signals or name == "log_decay"}
    log_decay, weight = _numbers(gate_decay(signals, call, torch.float32), Hv), _numbers(_weight(call, plan), Hv)
    return scalar_gate(
        q.contiguous(), k.contiguous(), v.contiguous(), log_decay, weight,
        start, cu_seqlens, call.scale, plan.erase, plan.look_before, plan.read_before,
    )  # fmt: skip


def _weight(call: Call, plan: Plan) -> Tensor | None:
    """The write's weight: the step that the step rule makes of the declared one, times the objective's slope."""
    step, k, (_, _, H, Hv, _, _) = call.signals["step"], call.k, call.sizes
    if plan.curvature is None:
        if isinstance(step, Tensor):
            return step if plan.factor == 1.0 else step.float() * plan.factor
        return None if step * plan.factor == 1.0 else _number(step * plan.factor, Hv, k.device)
    # heads as [H, Hv / H]: the value heads of a group share their key
    step = _tensor(step, Hv, k.device).float().unflatten(-1, (H, Hv // H))[..., None, None]
    with torch.autocast(k.device.type, enabled=False):
        taken = call.spec.optimizer.step_rule.effective(step, k.float()[..., None, :, None], plan.curvature)
    taken = taken.expand(*k.shape[:-1], Hv // H, 1, 1).reshape(*k.shape[:-2], Hv)
    return taken if plan.factor == 1.0 else taken * plan.factor


def _numbers(x: Tensor | None, Hv: int) -> Tensor | None:
    """As the kernels take one number a head: float32, [Hv] or [B, T, Hv], contiguous."""
    if x is None:
        return None
    x = x if x.ndim else x.expand(Hv)
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def _tensor(x: Tensor | float, Hv: int, device: torch.device) -> Tensor:
    """At least [Hv]."""
    return (x if x.ndim else x.expand(Hv)) if isinstance(x, Tensor) else _number(x, Hv, device)


def _number(value: float, Hv: int, device: torch.device) -> Tensor:
    """[Hv] of one number."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.full((Hv,), value, dtype=torch.float32, device=device)  # what a graph fills is empty until it is replayed
    return _kept_number(value, Hv, device)


@lru_cache(maxsize=1024)
def _kept_number(value: float, Hv: int, device: torch.device) -> Tensor:
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.full((Hv,), value, dtype=torch.float32, device=device)


def _start(call: Call, plan: Plan, n: int) -> Tensor | None:
    """[N, Hv, dk, dv], with a normaliser [N, Hv, dk, dv + 1]; None: zeros."""
    given, spec, (_, _, _, Hv, dk, dv) = call.initial_state, call.spec, call.sizes
    if given is None and plan.zero:
        return None
    if not plan.pad and isinstance(given, State) and _fits(given, call.facts.hash, (n, Hv, dk, dv), call.q.device):
        return given.weights["W"].float().contiguous()
    params = {name: p.float() for name, p in call.params.items()}
    state = initial(given, spec, params, n, Hv, dk, dv, torch.float32, call.q.device)
    if plan.pad:
        state = normalizer.join(state)
    return state.weights["W"].contiguous()


def _fits(given: State, spec_hash: str, shape: tuple[int, ...], device: torch.device) -> bool:
    """The usual State, recognised without building another to compare with."""
    if given.spec_hash != spec_hash or given.weights.keys() != {"W"} or given.slots or given.mini_batch:
        return False
    W = given.weights["W"]
    return W.shape == shape and W.device == device


_checked: tuple[Any, int, int] | None = None  # the last cu_seqlens that was looked at, its version, T


def _packed(cu_seqlens: Tensor, B: int, T: int, device: torch.device) -> Tensor:
    """int32 on the device. On CUDA nobody waits for its values: a wrong one is a device-side assertion.

    The layers of a model pass one and the same tensor: it is looked at once.
    """
    global _checked
    check_packed(cu_seqlens, B)
    out = cu_seqlens.to(device, torch.int32)
    if torch.compiler.is_compiling():
        _assert_packed(out, T)
    elif device.type == "cpu":
        sequences(cu_seqlens, B, T, device)
    else:
        version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
        if version < 0 or _checked is None or _checked[0]() is not cu_seqlens or _checked[1:] != (version, T):
            _assert_packed(out, T)
            _checked = weakref.ref(cu_seqlens), version, T
    return out.contiguous()


def _assert_packed(cu_seqlens: Tensor, T: int) -> None:
    zero = cu_seqlens.new_zeros(1)
    gaps = torch.diff(cu_seqlens, prepend=zero, append=zero + T)  # what lies before, the sequences, what lies behind
    torch._assert_async(  # type: ignore[attr-defined]
        (gaps >= 0).all() & (gaps[0] + gaps[-1] == 0), "cu_seqlens: expected 0 = c_0 <= c_1 <= ... <= c_N = T"
    )
