"""`decode`: one token, the state updated in place; a fused kernel where there is one, else `regress` on one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..constant import constant
from ..gates import constant_decay
from ..lowering import is_linear
from ..objectives import slopes
from ..registry import unknown
from ..spec import Spec
from ..spec import spec as read_spec
from ..state import State, flatten
from .api import regress
from .arguments import Facts, axes_of, check_params, check_tensors, facts_of
from .triton.decode import op  # noqa: F401  (it registers ttr::scalar_gate_step)
from .triton.eligible import DTYPES, has_triton, plan_of, why_not_plain


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str | Mapping | Spec,
    state: State,
    *,
    step: Tensor | float | None = None,
    log_decay: Tensor | float | None = None,
    params: Mapping[str, Tensor] | None = None,
    write_key: Tensor | None = None,
    scale: float | None = None,
    **signals: Tensor | float,
) -> Tensor:
    """Read one token and update `state` in place: what `ttr.regress` gives for T = 1, without a new state.

    q, k: [B, H, dk]; v: [B, Hv, dv]; with `steps: n`, k, v, write_key and step carry a micro-step axis after B. Signals are
    values, as in `ttr.regress`: [B, Hv], [Hv] or a number ([B, Hv, dk] per key, [B, Hv, dv] per value). log_decay is a
    natural log, <= 0. state: of an earlier `ttr.regress` under the same declaration; its tensors keep their identity, so
    the call can be captured in a CUDA graph (after one eager call; not for declarations with an open mini-batch).

    On CUDA, with triton, a linear recurrence of one slot that takes a plain step on the gradient runs as one kernel, which takes W
    contiguous; everything else runs through `ttr.regress`. No gradients are taken.

    Returns o: [B, Hv, dv] in v's dtype. Raises ValueError naming the argument, what came and what was expected.
    """
    spec = read_spec(spec)
    given = {"step": step, "log_decay": log_decay, **signals}
    given = {name: value for name, value in given.items() if value is not None}
    facts, kernel = facts_of(spec), step_of(spec)
    B, Hv, dk, dv = _check_tensors(q, k, v, write_key, facts)
    _check_state(state, facts, kernel, B, Hv, dk, dv, q.device)
    if torch.is_grad_enabled():
        _refuse_gradients({"q": q, "k": k, "v": v, "write_key": write_key, **given}, params, state)
    for name, value in given.items():
        _check_signal(name, value, facts, B, Hv, dk, dv, q.device)
    for name, _, constant_value in facts.signals:
        if name not in given and constant_value is None:
            raise ValueError(f"{name} is missing: it is declared per token; pass its values, {_shapes(name, facts, B, Hv, dk, dv)}")
    if scale is not None and (isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ValueError(f"scale={scale!r}: expected a finite number, or None for the declaration's")
    if kernel.fused and kernel_runs(q.device):
        W = state.weights["W"]
        if W.dtype == torch.float32 and all(x.dtype in DTYPES for x in (q, k, v)):
            return _through_kernel(q, k, v, write_key, W, given, params, spec, facts, kernel, scale)
    return _through_regress(q, k, v, spec, state, given, params, write_key, scale)


class Step(NamedTuple):
    """What one token's kernel asks of its declaration, beside what every call does."""

    linear: bool
    fused: bool  # a kernel serves it
    plain: bool  # fused, by the kernel of a single pair and a number a head
    rule: str
    eps: float


@constant
def step_of(spec: Spec) -> Step:
    step_rule = getattr(spec.optimizer, "step_rule", None)  # a solver has none
    rule = "plain" if step_rule is None or (step_rule.kind == "implicit" and not slopes(spec.objective, 1)[0]) else step_rule.kind
    linear = spec.regressor.family == "trained" and is_linear(spec)
    plain = spec.steps == 1 and not spec.separate_write_key and all(s.per == "head" for s in spec.signals().values())
    return Step(linear=linear, fused=_fused(spec), plain=plain, rule=rule, eps=getattr(step_rule, "eps", 0.0))


def _fused(spec: Spec) -> bool:
    """One slot and a plain step on the gradient, and the step knows its gate, its step rule and its read."""
    return (
        spec.regressor.family == "trained"
        and is_linear(spec)
        and not spec.optimizer.slots
        and why_not_plain(spec) is None
        and spec.gate.kind in ("none", "fixed", "scalar", "vector")
        and spec.optimizer.step_rule.kind in ("plain", "nlms", "implicit")
        and spec.read.normalizer == "none"
        and all(signal.per in ("head", "key", "value") for signal in spec.signals().values())
    )


def kernel_runs(device: torch.device) -> bool:
    """Where the fused step runs."""
    return device.type == "cuda" and torch.version.hip is None and has_triton()


def _through_kernel(
    q, k, v, write_key, W, given: dict[str, Any], params, spec: Spec, facts: Facts, kernel: Step, scale: float | None
) -> Tensor:
    dk, dv = W.shape[2:]
    plan = plan_of(spec, dv)
    if facts.computed_decay and "log_decay" not in given:
        given["log_decay"] = _own_decay(params, spec, facts, W)

    numbers: dict[str, Any] = {name: number for name, _, number in facts.signals}

    def split(name: str, neutral: float) -> tuple[Tensor | None, float]:
        """The tensor ([], [Hv] or [B, Hv]) or the number; `neutral` when the declaration has none."""
        value = given.get(name, numbers.get(name, neutral))
        return (value, neutral) if isinstance(value, Tensor) else (None, float(value))

    step, step_number = split("step", 1.0)
    decay, decay_number = split("log_decay", 0.0)
    scale = spec.scale(dk) if scale is None else float(scale)
    rule = plan.erase, plan.look_before, plan.read_before, kernel.rule
    if kernel.plain:
        return torch.ops.ttr.scalar_gate_step.default(
            q, k, v, step, decay, W, step_number, decay_number, plan.factor, kernel.eps, scale, *rule
        )  # fmt: skip
    (B, Hv), n = W.shape[:2], facts.steps
    per = "number" if step is None else next(per for name, per, _ in facts.signals if name == "step")
    per = "head" if step is not None and step.ndim < 2 else per  # [] and [Hv]
    width = {"key": (dk,), "value": (dv,)}.get(per, ())
    step = step if step is None else _pairs(step, 3 + len(width)).expand(B, n, Hv, *width)
    decay_per = "number" if decay is None else "key" if decay.ndim == 3 else "head"
    decay = decay if decay is None else decay.expand(B, Hv, *decay.shape[2:])
    return torch.ops.ttr.events_step.default(
        q, _pairs(k, 4).expand(B, n, *k.shape[-2:]), _pairs(v, 4).expand(B, n, Hv, dv),
        write_key if write_key is None else _pairs(write_key, 4).expand(B, n, *k.shape[-2:]), step, decay, W,
        step_number, decay_number, plan.factor, slopes(spec.objective, dv)[1], kernel.eps, scale, *rule, per, decay_per,
    )  # fmt: skip


def _pairs(x: Tensor, axes: int) -> Tensor:
    """[B, ...] of all of a token's pairs as [B, 1, ...]; `axes` with the pairs'."""
    return x if x.ndim != axes - 1 else x[:, None]


def _own_decay(params, spec: Spec, facts: Facts, W: Tensor) -> Tensor | None:
    """[Hv] of a gate that computes its decay."""
    _, Hv, dk, dv = W.shape
    if facts.constant_decay and not torch.compiler.is_compiling():  # torch.compile takes no tensor for a constant
        return constant_decay(spec.gate, Hv, W.device)
    decay = spec.gate.log_decay({}, n_heads=Hv, params=check_params(params, spec, Hv, dk, dv))
    return None if decay is None else decay.to(W.device)


def _through_regress(q, k, v, spec: Spec, state: State, given: dict[str, Any], params, write_key, scale) -> Tensor:
    def one_token(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or (name == "log_decay" and value.ndim == 1):
            return value
        return (value.expand(q.shape[0], -1) if value.ndim == 1 else value)[:, None]

    o, new = regress(
        q[:, None], k[:, None], v[:, None], spec, scale=scale, params=params, initial_state=state,
        write_key=None if write_key is None else write_key[:, None],
        **{name: one_token(name, value) for name, value in given.items()},
    )  # fmt: skip
    new = new.detach() if step_of(spec).linear else new.detach().clone()  # elsewhere a new tensor may be another old one
    old, new = flatten(state._trees()), flatten(new._trees())
    for name, tensor in new.items():
        if tensor.shape != old[name].shape:
            raise ValueError(
                f"state.{name} grows with every token ({list(old[name].shape)} -> {list(tensor.shape)}), so it cannot be updated "
                "in place; use ttr.regress(..., initial_state=state)"
            )
    for name, tensor in new.items():
        old[name].copy_(tensor)
    return o[:, 0]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, write_key: Tensor | None, facts: Facts) -> tuple[int, int, int, int]:
    """B, Hv, dk, dv."""
    check_tensors(q, k, v, write_key, facts)
    if q.ndim != 3:
        raise _wrong("q", q, "[B, H, dk] (one token: no axis T)")
    (B, H, dk), n = q.shape, facts.steps
    micro = f" or [{B}, {n}, {H}, {dk}]" if n > 1 else ""
    for name, x in (("k", k), ("write_key", write_key)):
        if x is not None and x.shape != q.shape and not (n > 1 and x.shape == (B, n, H, dk)):
            raise _wrong(name, x, f"{list(q.shape)} as q{micro}")
    if v.ndim not in ((3, 4) if n > 1 else (3,)) or v.shape[0] != B or (v.ndim == 4 and v.shape[1] != n):
        raise _wrong("v", v, f"[{B}, Hv, dv]" + (f" or [{B}, {n}, Hv, dv]" if n > 1 else ""))
    Hv, dv = v.shape[-2:]
    if min(B, H, Hv, dk, dv) == 0:
        raise ValueError(f"q {list(q.shape)}, v {list(v.shape)}: expected at least one sequence, head and channel")
    if Hv % H:
        raise ValueError(f"v: got {Hv} value heads, expected a multiple of q's {H} key heads")
    return B, Hv, dk, dv


def _check_state(state: State, facts: Facts, kernel: Step, B: int, Hv: int, dk: int, dv: int, device: torch.device) -> None:
    """The state is of this declaration and this size, and can be written in place."""
    if not isinstance(state, State):
        raise ValueError(f"state: got {type(state).__name__}, expected a ttr.State, which is updated in place")
    if state.spec_hash != facts.hash:
        raise ValueError(f"state was made under another declaration (hash {state.spec_hash!r}, this one {facts.hash!r})")
    if not kernel.fused:
        _check_separate(state)
        return
    W = state.weights["W"]
    if W.shape != (B, Hv, dk, dv):
        raise _wrong("state.weights.W", W, str([B, Hv, dk, dv]))
    if W.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state.weights.W: got dtype {W.dtype}, expected torch.float32 (or float64, which no kernel runs)")
    if W.device != device:
        raise ValueError(f"state.weights.W is on {W.device}, q on {device}")
    if not W.is_contiguous():
        raise ValueError(
            f"state.weights.W: got strides {list(W.stride())}, expected a contiguous tensor (it is updated in place); clone it"
        )


def _check_separate(state: State) -> None:
    """Every tensor has memory of its own; `regress` checks the rest."""
    seen: dict[int, str] = {}
    for name, t in flatten(state._trees()).items():
        if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
            raise ValueError(f"state.{name} is expanded (strides {list(t.stride())}) and cannot be updated in place; pass state.clone()")
        if t.numel() and not torch.compiler.is_compiling():
            other = seen.setdefault(t.data_ptr(), name)
            if other != name:
                raise ValueError(f"state.{name} and state.{other} share memory and cannot be updated in place; pass state.clone()")


def _refuse_gradients(tensors: Mapping[str, Any], params: Mapping[str, Tensor] | None, state: State) -> None:
    learned = {f"params[{name!r}]": p for name, p in (params or {}).items()}
    held = {f"state.{name}": t for name, t in flatten(state._trees()).items()}
    for name, t in {**tensors, **learned, **held}.items():
        if isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and decode overwrites the state that backward would need; "
                "call it under torch.no_grad(), or use ttr.regress"
            )


def _check_signal(name: str, value: Any, facts: Facts, B: int, Hv: int, dk: int, dv: int, device: torch.device) -> None:
    names = [declared for declared, _, _ in facts.signals] + ["log_decay"] * facts.computed_decay
    if name not in names:
        if name == "path":
            raise ValueError("path: decode has no paths; it takes its kernel where there is one")
        raise unknown("signal", name, names)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor or a number")
        if name == "log_decay" and not value <= 0:
            raise ValueError(f"log_decay={value}: expected a natural log <= 0 (is this a factor, not its log?)")
        return
    if not value.is_floating_point():
        raise ValueError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, q on {device}")
    if value.ndim and value.shape not in _allowed(name, facts, B, Hv, dk, dv):
        raise _wrong(name, value, _shapes(name, facts, B, Hv, dk, dv))


def _allowed(name: str, facts: Facts, B: int, Hv: int, dk: int, dv: int) -> list[tuple[int, ...]]:
    declared = [per for other, per, _ in facts.signals if other == name]
    per = declared[0] if declared else "key" if facts.per_key_decay else "head"
    width = axes_of(per, facts, dk, dv)
    shapes = [(B, Hv, *width)]
    if facts.steps > 1 and name not in facts.gate_signals and declared:
        shapes.append((B, facts.steps, Hv, *width))
    return [(Hv,), (B, Hv), *shapes] if name == "log_decay" else shapes if width else [(Hv,), *shapes]


def _shapes(name: str, facts: Facts, B: int, Hv: int, dk: int, dv: int) -> str:
    text = " or ".join(str(list(shape)) for shape in dict.fromkeys(_allowed(name, facts, B, Hv, dk, dv)))
    return text + (", natural log" if name == "log_decay" else "")


def _wrong(name: str, x: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")
