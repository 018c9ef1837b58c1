"""`regress`: validate one call, bring it into the layout of the paths, run the chosen path, give back outputs and state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..inner_loop import complete_state
from ..lowering import select_path
from ..registry import unknown
from ..spec import Spec
from ..spec import spec as read_spec
from ..state import State, flatten
from . import normalizer
from .arguments import check_params, check_shapes, sequences, signal_values
from .paths import PATHS, TAKE_GRADIENTS, fresh_state
from .problem import Problem


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
    path: str | Mapping[str, Any] = "auto",
    **signals: Tensor | float,
) -> tuple[Tensor, State]:
    """Read a sequence with a test-time regressor: o_t = f_t(scale q_t), f_t trained on the pairs (k_i, v_i), i <= t.

    q, k: [B, T, H, dk]; v: [B, T, Hv, dv], Hv a multiple of H (value head h reads with key head h // (Hv / H)). With
    `steps: n`, k, v, write_key and step carry a micro-step axis after T ([B, T, n, H, d]); without it a pair repeats.
    Signals are values, not logits: [B, T, Hv], [B, T, Hv, dk] where declared per key, [B, T, Hv, dv] per value; a
    number stands for all tokens. log_decay: [Hv], [B, T, Hv] or [B, T, Hv, dk], natural log, <= 0. A declared signal
    may be left out only where its declaration is a number (or the gate is fixed).
    params: learned constants from `spec.init_params(Hv, dk, dv)`. scale: None means the declaration's.
    initial_state: a State, or [B, Hv, dk, dv] for linear regressors. cu_seqlens: [N+1] int32, B = 1; states have N.
    path: auto | definition | recurrent | chunk | dual | sdpa, or {kind: chunk, chunk_size: 32}.
    The layer part of the declaration (norms, feature maps, projections) never acts here.

    Returns o: [B, T, Hv, dv] in v's dtype, and the State after the last token (float32, float64 for float64 inputs).
    Raises ValueError (SpecError for declarations) naming the argument, what came and what was expected.
    """
    spec = read_spec(spec)
    given = {"step": step, "log_decay": log_decay, "momentum": momentum, **signals}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = check_shapes(q, k, v, write_key, spec)
    B, T, H, Hv, dk, dv = sizes
    spec.regressor.check_sizes(dk, dv)
    params = check_params(params, spec, Hv, dk, dv)
    dtype = _working_dtype(q, k, v, write_key, *given.values(), *params.values(), initial_state)
    values, decay = signal_values(given, spec, sizes, dtype, q.device, params)
    if scale is not None and (isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ValueError(f"scale={scale!r}: expected a finite number, or None for the declaration's")
    run, options = _runner(path, spec, T, q.device)

    group = Hv // H
    if cu_seqlens is None:
        lengths, index, n_seq = None, None, B
    else:
        lengths, index = sequences(cu_seqlens, B, T, q.device)
        n_seq = len(lengths)

    def lay(x: Tensor, lead: int, heads: bool = False) -> Tensor:
        """[B, T, *, H, d] -> [N, Hv, T, *, d]; `lead` axes between T and H are kept."""
        x = x.to(dtype)
        if index is not None:
            x = x[0][index]
        x = x.movedim(2 + lead, 1)
        return x.repeat_interleave(group, 1) if heads and group > 1 else x

    def events(x: Tensor, heads: bool) -> Tensor:
        """k, v or write_key, with or without a micro-step axis -> [N, Hv, T, n, d]."""
        x = lay(x, x.ndim - 4, heads)
        return x if x.ndim == 5 else x[:, :, :, None].expand(-1, -1, -1, spec.steps, -1)

    values_laid = {name: _lay_signal(lay, x, spec.signals()[name].per, spec.steps) for name, x in values.items()}
    v_laid = events(v, False)
    params = {name: p.to(dtype) for name, p in params.items()}
    state = _initial(initial_state, spec, params, n_seq, Hv, dk, dv, dtype, q.device)
    if T == 0 or n_seq == 0:
        return v.new_zeros(B, T, Hv, dv), state
    normalized = spec.read.normalizer != "none"
    problem = Problem(
        spec=spec,
        q=lay(q, 0, True) * (spec.scale(dk) if scale is None else scale),
        k=events(k, True), v=normalizer.with_ones(v_laid) if normalized else v_laid,
        write_key=None if write_key is None else events(write_key, True),
        signals=values_laid, log_decay=None if decay is None else lay(decay, 0),
        params=params, state=normalizer.join(state) if normalized else state, lengths=lengths,
    )  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):  # the state is float32 and stays it
        o, state = _run(run, problem, options)
    if normalized:
        o, state = normalizer.normalize(o, spec.read), normalizer.split(state)
    o = rearrange(o, "n h t d -> n t h d")
    if index is not None and lengths is not None:
        o = torch.cat([o[i, :n] for i, n in enumerate(lengths)])[None]
    return o.to(v.dtype), state


def _working_dtype(*given: Any) -> torch.dtype:
    """float64 if anything given is, else float32; of a State its weights count."""
    tensors = [t for x in given for t in (x.weights.values() if isinstance(x, State) else [x]) if isinstance(t, Tensor)]
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _runner(path: str | Mapping[str, Any], spec: Spec, length: int, device: torch.device) -> tuple[Callable, dict[str, Any]]:
    """The function that runs the chosen path, and its options."""
    if not isinstance(path, (str, Mapping)):
        raise ValueError(f"path: got {type(path).__name__}, expected a path's name or a mapping, as {{'kind': 'chunk', 'chunk_size': 32}}")
    options = {"kind": path} if isinstance(path, str) else dict(path)
    asked = options.pop("kind", "auto")
    kind, _ = select_path(spec, path=asked, length=None if options else length, device=device.type)
    run, allowed = PATHS[spec.regressor.family, kind]
    for name in options:
        if name not in allowed:
            raise unknown(f"path {kind!r}: option", name, allowed)
    return run, options


def _run(run: Callable, problem: Problem, options: dict[str, Any]) -> tuple[Tensor, State]:
    if torch.is_inference_mode_enabled() and run in TAKE_GRADIENTS:
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
    """[B, T, (n,) Hv, (d)] -> [N, Hv, T, n, d1, d2]."""
    if per in ("head", "tensor"):
        x = x[..., None]
    x = lay(x, x.ndim - 4)  # [N, Hv, T, (n,) d]
    if x.ndim == 4:
        x = x[:, :, :, None].expand(-1, -1, -1, steps, -1)
    return x[..., None, :] if per == "value" else x[..., None]


def _initial(given: State | Tensor | None, spec: Spec, params, n: int, Hv: int, dk: int, dv: int, dtype, device) -> State:
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
        return complete_state(spec, {"W": given.to(dtype)}, dk)
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
