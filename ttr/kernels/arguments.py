"""The arguments of `regress`, checked: every error names the argument, what came, what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..registry import unknown
from ..spec import Spec

Sizes = tuple[int, int, int, int, int, int]  # B, T, H, Hv, dk, dv


def check_shapes(q: Tensor, k: Tensor, v: Tensor, write_key: Tensor | None, spec: Spec) -> Sizes:
    """The sizes of a call whose q, k, v and write_key fit each other and the declaration."""
    if (write_key is not None) != spec.separate_write_key:
        raise ValueError(
            "write_key is missing: the declaration says optimizer.write_key='separate'" if write_key is None
            else "write_key was given, but the declaration has optimizer.write_key='same'"
        )  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v), ("write_key", write_key)):
        if x is None and name == "write_key":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor")
        if not x.is_floating_point():
            raise ValueError(f"{name}: got dtype {x.dtype}, expected a floating-point dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")

    def wrong(name: str, x: Tensor, expected: str) -> ValueError:
        return ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")

    if q.ndim != 4:
        raise wrong("q", q, "[B, T, H, dk]")
    n = spec.steps
    B, T, H, dk = q.shape
    micro = f" or [{B}, {T}, {n}, {H}, {dk}]" if n > 1 else ""
    for name, x in (("k", k), ("write_key", write_key)):
        if x is not None and x.shape != q.shape and not (n > 1 and x.shape == (B, T, n, H, dk)):
            raise wrong(name, x, f"{list(q.shape)} as q{micro}")
    if v.ndim not in ((4, 5) if n > 1 else (4,)) or v.shape[:2] != (B, T) or (v.ndim == 5 and v.shape[2] != n):
        raise wrong("v", v, f"[{B}, {T}, Hv, dv]" + (f" or [{B}, {T}, {n}, Hv, dv]" if n > 1 else ""))
    Hv, dv = v.shape[-2:]
    if min(H, Hv, dk, dv) == 0:
        raise ValueError(f"q {list(q.shape)}, v {list(v.shape)}: expected at least one head and one channel")
    if Hv % H:
        raise ValueError(f"v: got {Hv} value heads, expected a multiple of q's {H} key heads")
    return B, T, H, Hv, dk, dv


def check_params(params: Mapping[str, Tensor] | None, spec: Spec, Hv: int, dk: int, dv: int) -> dict[str, Tensor]:
    """The learned constants by name, all of them and of the right shapes."""
    if params is not None and not isinstance(params, Mapping):
        raise ValueError(f"params: got {type(params).__name__}, expected a mapping from names to tensors")
    expected = spec.param_shapes(Hv, dk, dv)
    params = dict(params or {})
    for name in params:
        if name not in expected:
            raise unknown("params: name", name, expected)
    missing = [name for name in expected if name not in params]
    if missing:
        make = f"params=spec.init_params({Hv}, {dk}, {dv}) makes them"
        raise ValueError(f"params is missing {missing}: this declaration has learned constants; {make}")
    for name, shape in expected.items():
        got = params[name]
        if not isinstance(got, Tensor) or tuple(got.shape) != shape:
            what = f"shape {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"params[{name!r}]: got {what}, expected {list(shape)}")
    return params


def signal_values(
    given: Mapping[str, Any], spec: Spec, sizes: Sizes, dtype: torch.dtype, device: torch.device, params: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Signal values in the caller's layout, and the gate's log decay [B, T, Hv, d1] or None. dtype: of numbers."""
    B, T, _, Hv, dk, dv = sizes
    declared = spec.signals()
    fixed = spec.gate.kind != "none" and "log_decay" not in declared  # a gate that computes its decay may be overridden
    for name in given:
        if name not in declared and not (name == "log_decay" and fixed):
            raise unknown("signal", name, [*declared, "log_decay"] if fixed else declared)

    def tensor(name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise ValueError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
            return value
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor or a number")
        return torch.full((), float(value), dtype=dtype, device=device)  # not torch.tensor: no copy from the host

    values: dict[str, Tensor] = {}
    gate_signals = spec.gate.signals()
    for name, s in declared.items():
        raw = given.get(name, s.value)
        if raw is None:
            expected = _expected(name, s.per, spec, sizes)
            raise ValueError(f"{name} is missing: it is declared per token (map {s.map.kind!r}); pass its values, {expected}")
        value = tensor(name, raw)
        width = {"key": (dk,), "value": (dv,)}.get(s.per, ())
        plain, micro = (B, T, Hv, *width), (B, T, spec.steps, Hv, *width)
        if value.ndim == 0:
            value = value.expand(plain)
        elif name == "log_decay" and value.shape in ((Hv,), (B, T, Hv)):  # per head, for every key channel
            value = value.view(*value.shape, *([1] * len(width))).expand(plain)
        if value.shape != plain and not (spec.steps > 1 and name not in gate_signals and value.shape == micro):
            raise ValueError(f"{name}: got shape {list(value.shape)}, expected {_expected(name, s.per, spec, sizes)}")
        values[name] = value
    if fixed and "log_decay" in given:
        decay = tensor("log_decay", given["log_decay"])
    else:
        decay = spec.gate.log_decay(values, n_heads=Hv, params=params)
    values = {name: x for name, x in values.items() if name not in gate_signals}
    return values, None if decay is None else _full_decay(decay.to(device), spec, sizes)


def _full_decay(decay: Tensor, spec: Spec, sizes: Sizes) -> Tensor:
    """[], [Hv], [B, T, Hv] or, from a gate per key channel, [Hv, dk] or [B, T, Hv, dk] -> [B, T, Hv, d1]."""
    B, T, _, Hv, dk, _ = sizes
    per_head, per_key = ((), (Hv,), (B, T, Hv)), ((Hv, dk), (B, T, Hv, dk)) if spec.gate.per_key else ()
    if decay.shape not in (*per_head, *per_key):
        more = f" or [{B}, {T}, {Hv}, {dk}]" if spec.gate.per_key else ""
        raise ValueError(f"log_decay: got shape {list(decay.shape)}, expected [{Hv}] or [{B}, {T}, {Hv}]{more}, natural log")
    _check_decay(decay)
    if decay.shape not in per_key:
        decay = decay[..., None]
    return decay.expand(B, T, Hv, dk if spec.gate.per_key else 1)


def _expected(name: str, per: str, spec: Spec, sizes: Sizes) -> str:
    B, T, _, Hv, dk, dv = sizes
    tail = {"key": f", {dk}", "value": f", {dv}"}.get(per, "")
    text = f"[{B}, {T}, {Hv}{tail}] (per {per})"
    if name == "log_decay":
        heads = f"[{Hv}] or [{B}, {T}, {Hv}]"
        return f"{heads} or {text}, natural log" if tail else f"{heads}, natural log"
    micro = spec.steps > 1 and name not in spec.gate.signals()
    return text + (f" or [{B}, {T}, {spec.steps}, {Hv}{tail}]" if micro else "")


def _check_decay(decay: Tensor) -> None:
    """A positive or NaN log decay is refused where looking costs nothing: eager, on the CPU."""
    if decay.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(decay):  # type: ignore[attr-defined]
        return
    if not bool((decay <= 0).all()):
        raise ValueError(
            f"log_decay: got a maximum of {decay.max().item():.4g}, expected natural logs <= 0 (is this a factor, not its log?)"
        )


def sequences(cu_seqlens: Tensor, B: int, T: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Lengths of the packed sequences, and the token each slot of the padded [N, max length] batch takes."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: got {type(cu_seqlens).__name__}, expected a tensor, [N+1] int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, expected [N+1] int32")
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row: expected B = 1, got B = {B}")
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != T or min(lengths) < 0:
        raise ValueError(f"cu_seqlens={bounds}: expected 0 = c_0 <= c_1 <= ... <= c_N = T = {T}")
    start = torch.tensor(bounds[:-1], device=device)[:, None]
    last = torch.tensor([max(b - 1, 0) for b in bounds[1:]], device=device)[:, None]
    index = torch.minimum(start + torch.arange(max(lengths), device=device), last)  # behind the end: copies, no events
    return lengths, index.clamp(max=max(T - 1, 0))
