"""`regress`: validate one call, bring it into the layout of the paths, run the chosen path, give back outputs and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..lowering import select_path
from ..registry import unknown
from ..spec import Spec
from ..spec import spec as read_spec
from ..state import State
from .paths import PATHS, fresh_state, wrap_weights
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
    path: auto | definition | recurrent | chunk | sdpa, or {kind: chunk, chunk_size: 32}.
    The layer part of the declaration (norms, feature maps, projections) never acts here.

    Returns o: [B, T, Hv, dv] in v's dtype, and the State after the last token (float32, float64 for float64 inputs).
    Raises ValueError (SpecError for declarations) naming the argument, what came and what was expected.
    """
    spec = read_spec(spec)
    given = {"step": step, "log_decay": log_decay, "momentum": momentum, **signals}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = _check_shapes(q, k, v, write_key, spec)
    B, T, H, Hv, dk, dv = sizes
    spec.regressor.check_sizes(dk, dv)
    params = _check_params(params, spec, Hv, dk, dv)
    values, decay = _signals(given, spec, sizes, q, params)
    floats = [q, k, v, *values.values(), *params.values(), *([] if decay is None else [decay])]
    if isinstance(initial_state, Tensor):
        floats.append(initial_state)
    elif initial_state is not None:
        floats += [t for t in initial_state.weights.values()]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32

    group = Hv // H
    if cu_seqlens is None:
        lengths, index, n_seq = None, None, B
    else:
        lengths, index = _sequences(cu_seqlens, B, T, q.device)
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
    if spec.read.normalizer != "none":
        v_laid = torch.cat([v_laid, torch.ones_like(v_laid[..., :1])], -1)
    params = {name: p.to(dtype) for name, p in params.items()}
    state = _initial(initial_state, spec, params, n_seq, Hv, dk, dv, dtype, q.device)
    if T == 0:
        return v.new_zeros(B, 0, Hv, dv), state
    problem = Problem(
        spec=spec,
        q=lay(q, 0, True) * (spec.scale(dk) if scale is None else scale),
        k=events(k, True), v=v_laid, write_key=None if write_key is None else events(write_key, True),
        signals=values_laid, log_decay=None if decay is None else lay(decay, 0),
        params=params, state=_join_normalizer(state, spec), lengths=lengths,
    )  # fmt: skip
    options = {} if isinstance(path, str) else {k: x for k, x in path.items() if k != "kind"}
    kind, _ = select_path(spec, path=path if isinstance(path, str) else path.get("kind", "auto"), length=T, device=q.device.type)
    run, allowed = PATHS[spec.regressor.family, kind]
    for name in options:
        if name not in allowed:
            raise unknown(f"path {kind!r}: option", name, allowed)
    o, state = run(problem, **options)
    if spec.read.normalizer != "none":
        o = _normalize(o, spec)
        state = _split_normalizer(state, spec)
    o = rearrange(o, "n h t d -> n t h d")
    if index is not None and lengths is not None:
        o = torch.cat([o[i, :n] for i, n in enumerate(lengths)])[None]
    return o.to(v.dtype), state


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, write_key: Tensor | None, spec: Spec) -> tuple[int, ...]:
    n = spec.steps

    def wrong(name: str, x: Tensor, expected: str) -> ValueError:
        return ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")

    if q.ndim != 4:
        raise wrong("q", q, "[B, T, H, dk]")
    B, T, H, dk = q.shape
    micro = f" or [{B}, {T}, {n}, {H}, {dk}]" if n > 1 else ""
    for name, x in (("k", k), ("write_key", write_key)):
        if x is not None and x.shape != q.shape and not (n > 1 and x.shape == (B, T, n, H, dk)):
            raise wrong(name, x, f"{list(q.shape)} as q{micro}")
    if v.ndim not in ((4, 5) if n > 1 else (4,)) or v.shape[:2] != (B, T) or (v.ndim == 5 and v.shape[2] != n):
        raise wrong("v", v, f"[{B}, {T}, Hv, dv]" + (f" or [{B}, {T}, {n}, Hv, dv]" if n > 1 else ""))
    Hv, dv = v.shape[-2:]
    if Hv % H:
        raise ValueError(f"v: got {Hv} value heads, expected a multiple of q's {H} key heads")
    if (write_key is not None) != spec.separate_write_key:
        raise ValueError(
            "write_key is missing: the declaration says optimizer.write_key='separate'" if write_key is None
            else "write_key was given, but the declaration has optimizer.write_key='same'"
        )  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: got dtype {x.dtype}, expected a floating-point dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    return B, T, H, Hv, dk, dv


def _check_params(params: Mapping[str, Tensor] | None, spec: Spec, Hv: int, dk: int, dv: int) -> dict[str, Tensor]:
    expected = spec.param_shapes(Hv, dk, dv)
    params = dict(params or {})
    for name in params:
        if name not in expected:
            raise unknown("params: name", name, expected)
    missing = [name for name in expected if name not in params]
    if missing:
        raise ValueError(f"params is missing {missing}: this declaration has learned constants; params=spec.init_params({Hv}, {dk}, {dv}) makes them")
    for name, shape in expected.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"params[{name!r}]: got shape {list(params[name].shape)}, expected {list(shape)}")
    return params


def _signals(given: dict[str, Any], spec: Spec, sizes: tuple[int, ...], like: Tensor, params: dict[str, Tensor]):
    """Checked signal values in the caller's layout, and the gate's log decay [B, T, Hv, d1] or None."""
    B, T, _, Hv, dk, dv = sizes
    declared, gate_signals = spec.signals(), spec.gate.signals()
    fixed = spec.gate.kind != "none" and "log_decay" not in declared  # a gate that computes its decay may be overridden
    values: dict[str, Tensor] = {}
    for name in given:
        if name not in declared and not (name == "log_decay" and fixed):
            raise unknown("signal", name, declared)
    for name, s in declared.items():
        value = given.get(name, s.value)
        if value is None:
            raise ValueError(f"{name} is missing: it is declared per token (map {s.map.kind!r}); pass its values, {_expected(name, s.per, spec, sizes)}")
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=like.dtype, device=like.device)
        width = {"key": (dk,), "value": (dv,)}.get(s.per, ())
        if value.ndim == 0:
            value = value.expand(B, T, Hv, *width)
        elif name == "log_decay" and value.shape == (Hv,):
            value = value.view(1, 1, Hv, *([1] * len(width))).expand(B, T, Hv, *width)
        plain, micro = (B, T, Hv, *width), (B, T, spec.steps, Hv, *width)
        if value.shape != plain and not (spec.steps > 1 and name not in gate_signals and value.shape == micro):
            raise ValueError(f"{name}: got shape {list(value.shape)}, expected {_expected(name, s.per, spec, sizes)}")
        values[name] = value
    if fixed and "log_decay" in given:
        decay = given["log_decay"]
        decay = decay if isinstance(decay, Tensor) else torch.tensor(float(decay), dtype=like.dtype, device=like.device)
    else:
        decay = spec.gate.log_decay(values, n_heads=Hv, params=params)
    values = {name: x for name, x in values.items() if name not in gate_signals}
    if decay is None:
        return values, None
    width = dk if spec.gate.per_key else 1
    decay = decay.to(like.device)
    if decay.ndim <= 1:
        decay = decay.expand(B, T, Hv)
    if decay.ndim == 3:
        decay = decay[..., None].expand(B, T, Hv, width)
    if decay.shape != (B, T, Hv, width):
        raise ValueError(f"log_decay: got shape {list(decay.shape)}, expected [{Hv}], [{B}, {T}, {Hv}]" + (f" or [{B}, {T}, {Hv}, {dk}]" if width > 1 else ""))
    _check_decay(decay)
    return values, decay


def _expected(name: str, per: str, spec: Spec, sizes: tuple[int, ...]) -> str:
    B, T, _, Hv, dk, dv = sizes
    tail = {"key": f", {dk}", "value": f", {dv}"}.get(per, "")
    text = f"[{B}, {T}, {Hv}{tail}] (per {per})"
    if name == "log_decay":
        return f"[{Hv}] or {text}, natural log"
    micro = spec.steps > 1 and name not in spec.gate.signals()
    return text + (f" or [{B}, {T}, {spec.steps}, {Hv}{tail}]" if micro else "")


def _check_decay(decay: Tensor) -> None:
    """A positive or NaN log decay is refused where looking costs nothing: eager, on the CPU."""
    if decay.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(decay):
        return
    if not bool((decay <= 0).all()):
        raise ValueError(f"log_decay: got a maximum of {decay.max().item():.4g}, expected natural logs <= 0 (is this a factor, not its log?)")


def _lay_signal(lay, x: Tensor, per: str, steps: int) -> Tensor:
    """[B, T, (n,) Hv, (d)] -> [N, Hv, T, n, d1, d2]."""
    if per in ("head", "tensor"):
        x = x[..., None]
    x = lay(x, x.ndim - 4)  # [N, Hv, T, (n,) d]
    if x.ndim == 4:
        x = x[:, :, :, None].expand(-1, -1, -1, steps, -1)
    return x[..., None, :] if per == "value" else x[..., None]


def _sequences(cu_seqlens: Tensor, B: int, T: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Lengths of the packed sequences, and the token each slot of the padded [N, max length] batch takes."""
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, expected [N+1] int32")
    bounds = cu_seqlens.tolist()
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row: expected B = 1, got B = {B}")
    if bounds[0] != 0 or bounds[-1] != T or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens={bounds}: expected 0 = c_0 <= c_1 <= ... <= c_N = T = {T}")
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    start = torch.tensor(bounds[:-1], device=device)[:, None]
    last = torch.tensor([max(b - 1, 0) for b in bounds[1:]], device=device)[:, None]
    index = torch.minimum(start + torch.arange(max(lengths), device=device), last)  # behind the end: copies, no events
    return lengths, index.clamp(max=max(T - 1, 0))


def _initial(given: State | Tensor | None, spec: Spec, params, n: int, Hv: int, dk: int, dv: int, dtype, device) -> State:
    fresh = fresh_state(spec, params, n, Hv, dk, dv, dtype, device)
    if given is None:
        return fresh
    if isinstance(given, Tensor):
        if not spec.regressor.linear or spec.read.normalizer != "none":
            raise ValueError("initial_state: a bare tensor is the W of a linear regressor without a normalizer; pass a State")
        if tuple(given.shape) != (n, Hv, dk, dv):
            raise ValueError(f"initial_state: got shape {list(given.shape)}, expected {[n, Hv, dk, dv]}")
        return wrap_weights(spec, {"W": given.to(dtype)}, dk)
    if not isinstance(given, State):
        raise ValueError(f"initial_state: got {type(given).__name__}, expected a ttr.State or a tensor")
    if given.spec_hash != spec.hash:
        raise ValueError(f"initial_state was made under another declaration (hash {given.spec_hash!r}, this one {spec.hash!r})")
    for name, w in fresh.weights.items():
        got = given.weights.get(name)
        if got is None or (got.shape != w.shape and spec.regressor.family != "kernel") or got.shape[:2] != w.shape[:2]:
            raise ValueError(f"initial_state.weights[{name!r}]: got {None if got is None else list(got.shape)}, expected {list(w.shape)}")
    return given._map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _join_normalizer(state: State, spec: Spec) -> State:
    """The normaliser is one more value channel of W while a path runs."""
    if spec.read.normalizer == "none":
        return state

    def join(tree):
        return {"W": torch.cat([tree["W"], tree["normalizer"]], -1)}

    return replace(state, weights=join(state.weights), slots={name: join(t) for name, t in state.slots.items()}, mini_batch=_map_weights(state.mini_batch, join))


def _split_normalizer(state: State, spec: Spec) -> State:
    def split(tree):
        return {"W": tree["W"][..., :-1], "normalizer": tree["W"][..., -1:]}

    return replace(state, weights=split(state.weights), slots={name: split(t) for name, t in state.slots.items()}, mini_batch=_map_weights(state.mini_batch, split))


def _map_weights(tree: Any, fn) -> Any:
    """Apply `fn` to the mappings inside an open mini-batch that hold a W."""
    if not isinstance(tree, dict):
        return tree
    return fn(tree) if "W" in tree else {k: _map_weights(v, fn) for k, v in tree.items()}


def _normalize(o: Tensor, spec: Spec) -> Tensor:
    o, n = o[..., :-1], o[..., -1:]
    return o / (n + spec.read.eps) if spec.read.normalizer == "sum" else o / n.abs().clamp_min(1.0)
