"""`regress`: check one call, choose its path, run it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..choice import PathChoice, check_options, kind_of, options_of, select_path
from ..spec import Spec
from ..spec import spec as read_spec
from ..state import State
from . import divergence, padded
from .arguments import Call, check_params, check_shapes, check_signals, facts_of
from .paths import PATHS
from .triton import path as triton_path
from .triton.eligible import capability_of


def regress(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str | Mapping | Spec,
    *,
    step: Tensor | float | None = None,
    log_decay: Tensor | float | None = None,
    momentum: Tensor | float | None = None,
    params: Mapping[str, Tensor] | None = None,
    write_key: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    path: PathChoice = "auto",
    **signals: Tensor | float,
) -> tuple[Tensor, State]:
    """Read a sequence with a test-time regressor: o_t = f_t(scale q_t), f_t trained on the pairs (k_i, v_i), i <= t.

    q, k: [B, T, H, dk]; v: [B, T, Hv, dv], Hv a multiple of H (value head h reads with key head h // (Hv / H)). With
    `steps: n`, k, v, write_key and step carry a micro-step axis after T ([B, T, n, H, d]); without it a pair repeats.
    Signals are values, not logits: [B, T, Hv], [B, T, Hv, dk] where declared per key, [B, T, Hv, dv] per value, and one for
    each of spec.weight_names per tensor or pair per window; a number stands for all tokens. log_decay: [Hv], [B, T, Hv] or
    [B, T, Hv, dk], natural log, <= 0. A declared signal may be left out only where its declaration is a number (or the gate is fixed).
    params: learned constants from `spec.init_params(Hv, dk, dv)`. scale: None means the declaration's.
    initial_state: a State, or [B, Hv, dk, dv] for linear regressors. cu_seqlens: [N+1] int32, B = 1; states have N.
    path: auto | definition | recurrent | chunk | dual | sdpa | triton, or with an option {kind: chunk, chunk_size: 32} or
    {kind: dual, compile: true} (whole mini-batches through torch.compile, slow at first). dual multiplies large matrices with
    bf16 operands where q, k and v are bf16, and keeps all else in float32: numbers are right to bf16's rounding (2^-9) times
    what the memory makes of it; cast q, k and v to float32 for operands in float32. triton (what auto takes on a GPU
    of compute capability 9.0 or more, where kernels go over chunks or mini-batches, or torch has no chunks; not for exact least
    squares and ridges that decay) computes in the
    widest dtype of q, k and v (one event at a time, exact least squares and ridges that decay: in float32), has no second
    derivative, and, but for mini-batches, looks at the values of cu_seqlens on the device alone: wrong ones are a device-side
    assertion.
    The layer part of the declaration (norms, feature maps, projections) never acts here.

    Returns o: [B, T, Hv, dv] in v's dtype, and the State after the last token (float32, float64 for float64 inputs).
    Raises ValueError (SpecError for declarations) naming the argument, what came and what was expected.
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"q: got {type(q).__name__}, expected a tensor; the declaration comes fourth, regress(q, k, v, spec)")
    spec = read_spec(spec)
    facts = facts_of(spec)
    given = {"step": step, "log_decay": log_decay, "momentum": momentum, **signals}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = check_shapes(q, k, v, write_key, facts)
    *_, Hv, dk, dv = sizes
    spec.regressor.check_sizes(dk, dv)
    if scale is not None and (isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ValueError(f"scale={scale!r}: expected a finite number, or None for the declaration's")
    call = Call(
        q, k, v, write_key, spec, facts, sizes, check_signals(given, spec, facts, sizes), check_params(params, spec, Hv, dk, dv),
        spec.scale(dk) if scale is None else float(scale), initial_state, cu_seqlens,
    )  # fmt: skip
    dtype = widest(call)
    kind, options = _choose(path, call, dtype)
    if kind == "triton":
        o, state = triton_path.run(call, dtype)
    else:
        o, state = padded.run(call, dtype, PATHS[spec.regressor.family, kind][0], options)
    divergence.check(call, o, state)
    return o, state


def widest(call: Call) -> torch.dtype:
    """Of q, k and v; float64 when anything given is (of a State its weights count)."""
    state = call.initial_state
    given = [call.write_key, *call.signals.values(), *call.params.values()]
    given += state.weights.values() if isinstance(state, State) else [state]
    for x in given:
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            return torch.float64
    dtype = call.q.dtype
    return dtype if dtype == call.k.dtype == call.v.dtype else torch.promote_types(torch.promote_types(dtype, call.k.dtype), call.v.dtype)


def _choose(path: PathChoice, call: Call, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    """The path of a call, and its options."""
    asked = kind_of(path)
    options = options_of(path)
    spec, device, (_, T, _, _, dk, dv) = call.spec, call.q.device, call.sizes
    kind, _ = select_path(
        spec, path=asked, length=None if options else T, device=device.type, dtype=dtype, dk=dk, dv=dv, capability=capability_of(device)
    )
    check_options(spec, kind, options)
    return kind, options
