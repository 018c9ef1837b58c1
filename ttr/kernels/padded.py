"""The torch paths' way in and out: a checked call as a `Problem` in float32 or float64, its outputs as the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..inner_loop import complete_state
from ..operands import operands_of
from ..spec import Spec
from ..state import State, flatten
from . import normalizer
from .arguments import Call, axes_of, gate_decay, sequences
from .paths import TAKE_GRADIENTS, fresh_state
from .problem import Problem


def run(call: Call, widest: torch.dtype, path: Callable, options: dict[str, Any]) -> tuple[Tensor, State]:
    """path: (problem, **options) -> (o [N, H, T, dv], state). widest: dtype given; float64 computes in float64, all
    else in float32, of which bf16 lets a path round the operands of large products."""
    q, v, spec, (B, T, H, Hv, dk, dv) = call.q, call.v, call.spec, call.sizes
    dtype = torch.float64 if widest == torch.float64 else torch.float32
    values, decay = full_signals(call, dtype)
    group = Hv // H
    if call.cu_seqlens is None:
        lengths, index, real, n_seq = None, None, None, B
    else:
        lengths, index = sequences(call.cu_seqlens, B, T, q.device)
        n_seq = len(lengths)
        real = torch.arange(index.shape[1], device=q.device) < torch.tensor(lengths, device=q.device)[:, None]

    def lay(x: Tensor, lead: int, heads: bool = False) -> Tensor:
        """[B, T, *, H, d] -> [N, Hv, T, *, d]; `lead` axes between T and H are kept."""
        x = x.to(dtype)
        if index is not None and real is not None:
            x = torch.where(real.view(*real.shape, *[1] * (x.ndim - 2)), x[0][index], 0)  # no events, and nothing of a neighbour's
        x = x.movedim(2 + lead, 1)
        return x.repeat_interleave(group, 1) if heads and group > 1 else x

    def events(x: Tensor, heads: bool) -> Tensor:
        """k, v or write_key, with or without a micro-step axis -> [N, Hv, T, n, d]."""
        x = lay(x, x.ndim - 4, heads)
        return x if x.ndim == 5 else x[:, :, :, None].expand(-1, -1, -1, spec.steps, -1)

    signals = spec.signals()
    values_laid = {name: _lay_signal(lay, x, signals[name].per, spec.steps) for name, x in values.items()}
    v_laid = events(v, False)
    params = {name: p.to(dtype) for name, p in call.params.items()}
    state = initial(call.initial_state, spec, params, n_seq, Hv, dk, dv, dtype, q.device)
    if T == 0 or n_seq == 0:
        return v.new_zeros(B, T, Hv, dv), state
    normalized = spec.read.normalizer != "none"
    problem = Problem(
        spec=spec, operands=operands_of(widest),
        q=lay(q, 0, True) * call.scale,
        k=events(call.k, True), v=normalizer.with_ones(v_laid) if normalized else v_laid,
        write_key=None if call.write_key is None else events(call.write_key, True),
        signals=values_laid, log_decay=None if decay is None else lay(decay, 0),
        params=params, state=normalizer.join(state) if normalized else state, lengths=lengths, fresh=call.initial_state is None,
    )  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):  # the state is float32 and stays it
        o, state = _run(path, problem, options)
    if normalized:
        o, state = normalizer.normalize(o, spec.read), normalizer.split(state)
    o = rearrange(o, "n h t d -> n t h d")
    if index is not None and lengths is not None:
        o = torch.cat([o[i, :n] for i, n in enumerate(lengths)])[None]
    return o.to(v.dtype), state


def full_signals(call: Call, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
    """Signals for every token, [B, T, (n,) Hv, (d)], and the gate's log decay [B, T, Hv, d1] or None. dtype: of numbers."""
    (B, T, _, Hv, dk, dv), facts, spec = call.sizes, call.facts, call.spec
    full: dict[str, Tensor] = {}
    declared = {name: per for name, per, _ in facts.signals}
    for name, value in call.signals.items():
        per = declared.get(name)  # None: an override of the gate's own, brought to its shape below
        width = axes_of(per or "head", facts, dk, dv)
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=dtype, device=call.q.device)  # not torch.tensor: no copy from the host
        if per and value.ndim == 0:
            value = value.expand(B, T, Hv, *width)
        elif per and name == "log_decay" and value.shape in ((Hv,), (B, T, Hv)):  # for every key channel
            value = value.view(*value.shape, *([1] * len(width))).expand(B, T, Hv, *width)
        full[name] = value
    decay = gate_decay(full, call, dtype)
    if decay is not None:
        d1 = dk if spec.gate.per_key else 1
        decay = (decay if decay.shape in ((Hv, dk), (B, T, Hv, dk)) and spec.gate.per_key else decay[..., None]).expand(B, T, Hv, d1)
    return {name: full[name] for name in declared if name not in facts.gate_signals}, decay


def _run(run: Callable, problem: Problem, options: dict[str, Any]) -> tuple[Tensor, State]:
    if run in TAKE_GRADIENTS and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # torch.func.grad inside inference mode gives zeros, silently, on torch 2.11: step out of it, with copies
        with torch.inference_mode(False), torch.no_grad():
            return run(problem.copy(), **options)
    try:
        return run(problem, **options)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise RuntimeError(
            f"{problem.spec.regressor.kind!r} with mini_batch={problem.spec.mini_batch!r} takes gradients while it reads, which "
            "torch.func does not do under saved-tensor hooks; use torch.utils.checkpoint.checkpoint(..., use_reentrant=True) "
            "around the layer, and no save_on_cpu"
        ) from error


def _lay_signal(lay, x: Tensor, per: str, steps: int) -> Tensor:
    """[B, T, (n,) Hv, (d)] -> [N, Hv, T, n, d1, d2]; per tensor and per window they lie along d1."""
    if per == "head":
        x = x[..., None]
    x = lay(x, x.ndim - 4)  # [N, Hv, T, (n,) d]
    if x.ndim == 4:
        x = x[:, :, :, None].expand(-1, -1, -1, steps, -1)
    return x[..., None, :] if per == "value" else x[..., None]


def initial(given: State | Tensor | None, spec: Spec, params, n: int, Hv: int, dk: int, dv: int, dtype, device) -> State:
    fresh = fresh_state(spec, params, n, Hv, dk, dv, dtype, device)
    if given is None:
        return fresh
    if isinstance(given, Tensor):
        if not spec.regressor.linear or spec.read.normalizer != "none":
            raise ValueError("initial_state: a bare tensor is the W of a linear regressor without a normalizer; pass a State")
        if tuple(given.shape) != (n, Hv, dk, dv):
            raise ValueError(f"initial_state: got shape {list(given.shape)}, expected {[n, Hv, dk, dv]}")
        if not given.is_floating_point():
            raise ValueError(f"initial_state: got dtype {given.dtype}, expected a floating-point dtype")
        return complete_state(spec, {"W": given.to(dtype)}, dk, dv)
    if not isinstance(given, State):
        raise ValueError(f"initial_state: got {type(given).__name__}, expected a ttr.State or a tensor")
    if given.spec_hash != spec.hash:
        raise ValueError(f"initial_state was made under another declaration (hash {given.spec_hash!r}, this one {spec.hash!r})")
    expected, got = flatten(fresh._trees()), flatten(given._trees())
    if expected.keys() != got.keys():
        raise ValueError(f"initial_state holds {sorted(got)}, expected {sorted(expected)}")
    for name, t in expected.items():
        fixed = 2 if spec.regressor.family == "kernel" else t.ndim  # a cache grows
        if got[name].ndim != t.ndim or got[name].shape[:fixed] != t.shape[:fixed]:
            raise ValueError(f"initial_state.{name}: got shape {list(got[name].shape)}, expected {list(t.shape)}")
        if got[name].device != t.device:
            raise ValueError(f"initial_state.{name} is on {got[name].device}, q on {t.device}")
    return given._map(lambda t: t.to(dtype) if t.is_floating_point() else t)
