"""The arguments of `regress`, checked: every error names the argument, what came, what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..constant import constant
from ..gates import constant_decay
from ..registry import unknown
from ..spec import Spec
from .eager import known

Sizes = tuple[int, int, int, int, int, int]  # B, T, H, Hv, dk, dv


class Facts(NamedTuple):
    """What every call asks of its declaration."""

    hash: str
    steps: int
    separate_write_key: bool
    signals: tuple[tuple[str, str, float | None], ...]  # name, per, the number it is declared as
    weights: tuple[str, ...]  # the tensors that a signal per tensor is for
    window: int  # the pairs that a signal per window is for
    gate_signals: tuple[str, ...]
    computed_decay: bool  # the gate makes its log decay itself; a caller may override it
    constant_decay: bool  # ... from nothing but the declaration and the heads
    per_key_decay: bool
    has_params: bool  # there are learned constants


class Call(NamedTuple):
    """The checked arguments of one `regress`, tensors in the caller's layout."""

    q: Tensor
    k: Tensor
    v: Tensor
    write_key: Tensor | None
    spec: Spec
    facts: Facts
    sizes: Sizes
    signals: dict[str, Tensor | float]
    params: dict[str, Tensor]
    scale: float
    initial_state: Any
    cu_seqlens: Tensor | None


@constant
def facts_of(spec: Spec) -> Facts:
    declared = spec.signals()
    computed = spec.gate.decays and "log_decay" not in declared
    return Facts(
        hash=spec.hash, steps=spec.steps, separate_write_key=spec.separate_write_key,
        signals=tuple((name, s.per, s.value) for name, s in declared.items()),
        weights=spec.weight_names, window=spec.window,
        gate_signals=tuple(spec.gate.signals()),
        computed_decay=computed,
        constant_decay=computed and not spec.gate.signals() and not spec.gate.init_params(1, 1),
        per_key_decay=spec.gate.per_key,
        has_params=bool(spec.param_shapes(1, 16, 16)),
    )  # fmt: skip


@constant
def param_shapes_of(spec: Spec, Hv: int, dk: int, dv: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """`spec.param_shapes`, worked out once: a gate makes its constants to say what they are."""
    return tuple(spec.param_shapes(Hv, dk, dv).items())


def check_tensors(q: Tensor, k: Tensor, v: Tensor, write_key: Tensor | None, facts: Facts) -> None:
    """Floating-point tensors on q's device, a write_key among them exactly where one is declared; their shapes are not looked at."""
    if (write_key is not None) != facts.separate_write_key:
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


def check_shapes(q: Tensor, k: Tensor, v: Tensor, write_key: Tensor | None, facts: Facts) -> Sizes:
    """The sizes of a call whose q, k, v and write_key fit each other and the declaration."""
    check_tensors(q, k, v, write_key, facts)

    def wrong(name: str, x: Tensor, expected: str) -> ValueError:
        return ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")

    if q.ndim != 4:
        raise wrong("q", q, "[B, T, H, dk]")
    n = facts.steps
    B, T, H, dk = *q.shape[:2], *map(index, q.shape[2:])  # heads and channels are numbers in a compiled graph
    for name, x in (("k", k), ("write_key", write_key)):
        if x is not None and x.shape != q.shape and not (n > 1 and x.shape == (B, T, n, H, dk)):
            # only now: a T that is put into words is a constant to torch.compile
            raise wrong(name, x, f"{list(q.shape)} as q" + (f" or [{B}, {T}, {n}, {H}, {dk}]" if n > 1 else ""))
    if v.ndim not in ((4, 5) if n > 1 else (4,)) or v.shape[:2] != (B, T) or (v.ndim == 5 and v.shape[2] != n):
        raise wrong("v", v, f"[{B}, {T}, Hv, dv]" + (f" or [{B}, {T}, {n}, Hv, dv]" if n > 1 else ""))
    Hv, dv = map(index, v.shape[-2:])
    if min(H, Hv, dk, dv) == 0:
        raise ValueError(f"q {list(q.shape)}, v {list(v.shape)}: expected at least one head and one channel")
    if Hv % H:
        raise ValueError(f"v: got {Hv} value heads, expected a multiple of q's {H} key heads")
    return B, T, H, Hv, dk, dv


def check_params(params: Mapping[str, Tensor] | None, spec: Spec, Hv: int, dk: int, dv: int) -> dict[str, Tensor]:
    """The learned constants by name, all of them and of the right shapes."""
    if params is not None and not isinstance(params, Mapping):
        raise ValueError(f"params: got {type(params).__name__}, expected a mapping from names to tensors")
    if not params and not facts_of(spec).has_params:
        return {}
    expected = dict(param_shapes_of(spec, Hv, dk, dv))
    params = dict(params or {})
    for name in params:
        if name not in expected:
            raise unknown("params: name", name, expected)
    missing = [name for name in expected if name not in params]
    if missing:
        make = f"params=ttr.spec(...).init_params({Hv}, {dk}, {dv}) makes them"
        raise ValueError(f"params is missing {missing}: this declaration has learned constants; {make}")
    for name, shape in expected.items():
        got = params[name]
        # lists: torch.compile (2.11) traces no comparison with a tuple that a constant holds
        if not isinstance(got, Tensor) or list(got.shape) != list(shape):
            what = f"shape {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"params[{name!r}]: got {what}, expected {list(shape)}")
    return params


def check_signals(given: Mapping[str, Any], spec: Spec, facts: Facts, sizes: Sizes) -> dict[str, Tensor | float]:
    """Every declared signal as it was given or declared, and a log_decay that overrides a gate's own; shapes checked."""
    B, T, _, Hv, dk, dv = sizes
    declared = [name for name, _, _ in facts.signals]
    for name in given:
        if name not in declared and not (name == "log_decay" and facts.computed_decay):
            if name in spec.param_shapes(Hv, dk, dv):
                raise ValueError(f"{name} is a learned constant of this declaration, not a signal: pass params={{{name!r}: ...}}")
            raise unknown("signal", name, [*declared, "log_decay"] if facts.computed_decay else declared)
    values: dict[str, Tensor | float] = {}
    for name, per, default in facts.signals:
        value = given.get(name, default)
        if value is None:
            expected = _expected(name, per, spec, sizes)
            raise ValueError(
                f"{name} is missing: it is declared per token (map {spec.signals()[name].map.kind!r}); pass its values, {expected}"
            )
        values[name] = _tensor_or_number(name, value)
        if name == "log_decay" and not isinstance(value, Tensor):
            _check_decay(values[name])
        if name == "weight" and getattr(spec.regressor, "never_negative", False):
            _check_weight(values[name])
        if isinstance(value, Tensor) and value.ndim:
            width = axes_of(per, facts, dk, dv)
            fits = value.shape == (B, T, Hv, *width) or (name == "log_decay" and value.shape in ((Hv,), (B, T, Hv)))
            if not fits and not (facts.steps > 1 and name not in facts.gate_signals and value.shape == (B, T, facts.steps, Hv, *width)):
                raise ValueError(f"{name}: got shape {list(value.shape)}, expected {_expected(name, per, spec, sizes)}")
    if facts.computed_decay and "log_decay" in given:
        values["log_decay"] = _tensor_or_number("log_decay", given["log_decay"])
    return values


def axes_of(per: str, facts: Facts, dk: int, dv: int) -> tuple[int, ...]:
    """The axes of a signal behind its heads."""
    return {"head": (), "key": (dk,), "value": (dv,), "tensor": (len(facts.weights),), "window": (facts.window,)}[per]


def _tensor_or_number(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise ValueError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor or a number")
    return float(value)


def gate_decay(signals: Mapping[str, Tensor], call: Call, dtype: torch.dtype) -> Tensor | None:
    """The log decay as the caller or the gate gives it: [], [Hv], [B, T, Hv] or, per key, [Hv, dk] or [B, T, Hv, dk].

    signals: of the call, as tensors. dtype: of a decay that is worked out here once.
    """
    spec, facts, device, (B, T, _, Hv, dk, _) = call.spec, call.facts, call.q.device, call.sizes
    if facts.computed_decay and "log_decay" in signals:
        decay = signals["log_decay"]
    elif facts.constant_decay:
        return constant_decay(spec.gate, Hv, device, dtype)
    else:
        decay = spec.gate.log_decay(dict(signals), n_heads=Hv, params=call.params)
    if decay is None:
        return None
    per_key = ((Hv, dk), (B, T, Hv, dk)) if spec.gate.per_key else ()
    shapes = (), (Hv,), (B, T, Hv), *per_key
    if decay.shape not in [shape for shape in shapes if len(shape) == decay.ndim]:  # T may be a symbol: it is not compared with dk
        more = f" or [{B}, {T}, {Hv}, {dk}]" if spec.gate.per_key else ""
        raise ValueError(f"log_decay: got shape {list(decay.shape)}, expected [{Hv}] or [{B}, {T}, {Hv}]{more}, natural log")
    _check_decay(decay)
    return decay.to(device)


def _expected(name: str, per: str, spec: Spec, sizes: Sizes) -> str:
    B, T, _, Hv, dk, dv = sizes
    facts = facts_of(spec)
    tail = "".join(f", {n}" for n in axes_of(per, facts, dk, dv))
    names = {"tensor": f": {', '.join(facts.weights)}", "window": ": the token's own pair, then those before it"}.get(per, "")
    text = f"[{B}, {T}, {Hv}{tail}] (per {per}{names})"
    if name == "log_decay":
        heads = f"[{Hv}] or [{B}, {T}, {Hv}]"
        return f"{heads} or {text}, natural log" if tail else f"{heads}, natural log"
    micro = spec.steps > 1 and name not in spec.gate.signals()
    return text + (f" or [{B}, {T}, {spec.steps}, {Hv}{tail}]" if micro else "")


def _check_decay(decay: Tensor | float) -> None:
    """A positive or NaN log decay is refused where looking costs nothing: numbers, and eager on the CPU."""
    if not isinstance(decay, Tensor):
        if not decay <= 0:
            raise ValueError(f"log_decay: got a maximum of {decay:.4g}, expected natural logs <= 0 (is this a factor, not its log?)")
        return
    if not known(decay):
        return
    if not bool((decay <= 0).all()):
        if bool(decay.isnan().any()):
            raise ValueError("log_decay: got NaN, expected natural logs <= 0 (a layer makes it of its input: is that finite?)")
        raise ValueError(
            f"log_decay: got a maximum of {decay.max().item():.4g}, expected natural logs <= 0 (is this a factor, not its log?)"
        )


def _check_weight(weight: Tensor | float) -> None:
    """A negative weight that is declared never to be is refused where a decay is: it has no square root, which a path may take."""
    if isinstance(weight, Tensor) and not (known(weight) and weight.numel()):
        return
    least = weight.detach().min().item() if isinstance(weight, Tensor) else weight
    if least < 0:
        raise ValueError(f"weight: got a minimum of {least:.4g}, expected >= 0, as declared (a map that may be negative: identity)")


def check_packed(cu_seqlens: Tensor, B: int) -> None:
    """Dtype and shape, which the host knows."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: got {type(cu_seqlens).__name__}, expected a tensor, [N+1] int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, expected [N+1] int32")
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row: expected B = 1, got B = {B}")


def packed_lengths(cu_seqlens: Tensor, B: int, T: int) -> list[int]:
    """Of the packed sequences; waits for the device."""
    check_packed(cu_seqlens, B)
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != T or min(lengths) < 0:
        raise ValueError(f"cu_seqlens={bounds}: expected 0 = c_0 <= c_1 <= ... <= c_N = T = {T}")
    return lengths


def sequences(cu_seqlens: Tensor, B: int, T: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Lengths of the packed sequences, and the token each slot of the padded [N, max length] batch takes; waits for the device."""
    lengths = packed_lengths(cu_seqlens, B, T)
    ends = list(accumulate(lengths))
    start = torch.tensor([0, *ends[:-1]], device=device)[:, None]
    last = torch.tensor([max(b - 1, 0) for b in ends], device=device)[:, None]
    index = torch.minimum(start + torch.arange(max(lengths), device=device), last)  # behind the end: copies, no events
    return lengths, index.clamp(max=max(T - 1, 0))
