"""Which path runs a declaration, and why: pure, and never silent."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

import torch

from .constant import constant
from .kernels.paths import PATHS
from .kernels.triton.eligible import in_float32, why_not_chunks, why_not_machine, why_not_triton
from .kernels.triton.sizes import why_not_sizes
from .lowering import folds_value_step, is_linear, looks_at_weights, per_value_signals
from .operands import operands_of
from .registry import unknown
from .spec import Spec
from .spec import spec as read_spec

NAMES = (*dict.fromkeys(path for _, path in PATHS), "triton")
PathChoice = str | Mapping[str, Any]  # a path's name, or {kind: name, option: value, ...}
SHORT = 8  # tokens below which one event at a time beats setting up a chunk


def kind_of(path: PathChoice) -> str:
    """The name in a path, `auto` where a mapping has none; its options are the call's to judge."""
    if not isinstance(path, (str, Mapping)):
        raise ValueError(f"path: got {type(path).__name__}, expected a path's name or a mapping, as {{'kind': 'chunk', 'chunk_size': 32}}")
    return path if isinstance(path, str) else path.get("kind", "auto")


def options_of(path: PathChoice) -> dict[str, Any]:
    """What a mapping holds besides the path's name."""
    return {} if isinstance(path, str) else {name: x for name, x in path.items() if name != "kind"}


def check_options(spec: Spec, kind: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that the path `kind` of a declaration does not have."""
    allowed = () if kind == "triton" else PATHS[spec.regressor.family, kind][1]
    for name in options:
        if not allowed:
            raise ValueError(f"path: {kind!r} has no options, got {name!r}")
        if name not in allowed:
            raise unknown(f"path {kind!r}: option", name, allowed)


def select_path(
    spec, *, path: str = "auto", length: int | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    dk: int | None = None, dv: int | None = None, capability: tuple[int, int] | None = None,
) -> tuple[str, str]:  # fmt: skip
    """The path that runs a declaration, and why: (path, reason).

    length: tokens of a call. device: cpu, cuda, ... (None: `auto` answers for a CPU, an explicit path is judged by its
    declaration). dtype: the widest of q, k and v; dk, dv: head sizes; capability: of the GPU. What is not told is taken to fit.
    Pure and never silent: an explicit `path` that cannot serve raises ValueError with the reason.
    """
    if not isinstance(path, str):
        raise ValueError(f"path: got {type(path).__name__}, expected a path's name; choose from {['auto', *NAMES]}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r}: expected a torch.dtype, as torch.bfloat16")
    short = index(length) if length is not None and length < SHORT else None
    if isinstance(device, torch.device):
        device = device.type
    elif device is not None:
        device = _kind(device)
    return _select(read_spec(spec), path, short, device, dtype, dk, dv, capability)


@constant
def _kind(device: str) -> str:
    """cuda of cuda:0; raises ValueError for what torch does not know."""
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected a torch.device or its name, as 'cpu', 'cuda' or 'cuda:0'") from error


@constant
def _select(spec, path: str, short: int | None, device, dtype, dk, dv, capability) -> tuple[str, str]:
    known = {"dtype": dtype, "dk": dk, "dv": dv, "capability": capability}
    possible = targets(spec, device=device or "cpu", **known)
    best, why = next(iter(possible.items()))
    if path == "auto":
        if short is not None and "recurrent" in possible:
            return "recurrent", f"{short} tokens: {possible['recurrent']}"
        told = is_linear(spec) or best == "dual" or spec.regressor.family == "least_squares"
        if device not in (None, "cpu") and best != "triton" and told:
            no = why_not_kernels(spec, device=device, **known)
            why += f"; no Triton kernel: {no}" if no is not None else f"; path='triton' would be {possible['triton']}"
        return best, why
    if path not in NAMES:
        raise unknown("path", path, ["auto", *possible, *(name for name in NAMES if name not in possible)])
    if path == "triton" and path not in possible:
        no = why_not_kernels(spec, device=device, **known)
        if no is None:
            return path, f"{_kernels(spec)} ({'in the interpreter' if device == 'cpu' else 'on a GPU'})"
        raise ValueError(f"path='triton' cannot serve this call: {no}; choose from {['auto', *possible]} ({best}: {why})")
    if path in possible:
        return path, possible[path]
    raise ValueError(f"path={path!r} cannot serve this declaration; choose from {['auto', *possible]} ({best}: {why})")


def targets(spec, *, device: str = "cpu", **known: Any) -> dict[str, str]:
    """The paths that can serve a declaration on a kind of device, fastest on long sequences first, each with the reason.

    known: dtype, dk, dv, capability, as in `select_path`.
    """
    possible = _torch_targets(spec)
    if "dual" in possible and operands_of(known.get("dtype")) is not None:
        possible["dual"] += "; bf16 operands in large products, float32 in all else"
    if device == "cpu" or why_not_kernels(spec, device=device, **known) is not None:
        return possible
    kernels = {"triton": _kernels(spec)}
    if next(iter(possible)) == "recurrent" and spec.regressor.family == "least_squares":  # `rls` under a gate
        return {"recurrent": possible["recurrent"], **kernels, **possible}
    if not in_float32(spec):
        return {**kernels, **possible}
    # slower than torch's closed forms (one event at a time, mesa), or not timed beside them
    chunks = {path: why for path, why in possible.items() if path == "chunk"}
    return {**chunks, **kernels, **possible}


def _kernels(spec) -> str:
    """What path='triton' makes of a declaration that it serves."""
    if spec.regressor.family == "least_squares":
        solve = "elimination at every token (less memory; for mesa slower, with a gate not timed beside torch's)"
        if spec.optimizer.kind == "cg":
            solve = "conjugate gradients on all tokens of a chunk at once"
            solve += ", in float32 (not timed beside torch's)" if in_float32(spec) else ""
        return f"Triton kernels: the statistics between chunks, {solve}"
    if spec.mini_batch != 1:
        return f"Triton kernels: gradients of a mini-batch ({spec.mini_batch}) at its first weights, masked attention inside it"
    if (why := why_not_chunks(spec)) is not None:
        return f"a Triton kernel, one event at a time, for none goes over chunks: {why}"
    return "Triton kernels: matmuls inside chunks, forward and backward, nothing of [T, dk, dv] in memory"


def why_not_kernels(
    spec, *, device: str | None = None, dtype: torch.dtype | None = None, dk: int | None = None, dv: int | None = None,
    capability: tuple[int, int] | None = None,
) -> str | None:  # fmt: skip
    """The first reason for which path='triton' cannot serve, or None; what is None is not judged."""
    why = why_not_triton(spec) or why_not_sizes(spec, dtype, dk, dv)
    if why is not None or device is None:
        return why
    return why_not_machine(device, capability, None if in_float32(spec) else dtype)


def _torch_targets(spec) -> dict[str, str]:
    if spec.regressor.family == "kernel":
        return {"sdpa": "softmax attention is torch's scaled_dot_product_attention", "definition": "one query at a time"}
    if spec.regressor.family == "least_squares":
        solver = spec.optimizer.kind
        solve = "conjugate gradients" if solver == "cg" else "an exact solve"
        read = {
            "chunk": f"least squares: the statistics chunk by chunk, {solve} at the read",
            "recurrent": f"least squares: token by token, {solve} at the read",
        }
        if solver == "rls" and spec.gate.decays:  # under wind-up the inverse is best carried from token to token
            read = {"recurrent": "recursive least squares carries the inverse from token to token", "chunk": read["chunk"]}
        return {**read, "definition": "the normal equations solved densely at every token"}
    if not is_linear(spec) and not why_not_dual(spec):
        kind = (
            "one step per mini-batch on the summed gradient" if spec.optimizer.accumulate else "masked attention inside it, layer by layer"
        )
        if not (spec.optimizer.accumulate or spec.optimizer.mirror.identity):
            kind = f"mirror {spec.optimizer.mirror.kind!r} of the weights of each of its tokens, which are made"
        return {
            "dual": f"gradients of a mini-batch ({spec.mini_batch}) at its first weights: {kind}",
            "definition": "token by token through torch.func.grad",
        }
    if not is_linear(spec):
        why = why_nonlinear(spec)
        no_dual = why_not_dual(spec)
        if spec.mini_batch != 1 and no_dual is not None and no_dual not in why:
            why = f"{why}; {no_dual}"
        return {"definition": f"token by token through torch.func.grad: {why}"}
    per_value = per_value_signals(spec)
    reason = "linear in the state: one canonical recurrence, probed from the optimizer"
    recurrent = {"recurrent": f"{reason}, one event at a time", "definition": "token by token through torch.func.grad"}
    if per_value and not folds_value_step(spec):
        recurrent["recurrent"] += f"; {per_value} per value channel gives each column its own triangular system, so there is no chunk form"
        return recurrent
    return {"chunk": f"{reason}, matmuls inside chunks", **recurrent}


def why_nonlinear(spec) -> str:
    """The first reason for which a trained declaration is no linear recurrence."""
    if not spec.regressor.linear:
        return f"regressor {spec.regressor.kind!r} is not linear in its weights"
    if not spec.optimizer.linear:
        return f"optimizer {spec.optimizer.kind!r} is not linear in (weights, gradient)"
    if not spec.objective.quadratic:
        return f"the gradient of objective {spec.objective.kind!r} is not affine in the prediction"
    if spec.gate.projects:
        return f"gate {spec.gate.kind!r} maps the weights after every update"
    if spec.window > 1:
        return f"objective.window={spec.window} takes the gradient of several pairs at once"
    if not spec.optimizer.mirror.identity:
        return f"mirror {spec.optimizer.mirror.kind!r} maps the weights before they predict"
    return f"mini_batch={spec.mini_batch!r} takes gradients at frozen weights, and {why_not_dual(spec)}"


def why_not_dual(spec) -> str | None:
    """The reason for which frozen gradients have no dual form, or None when they have one."""
    if spec.mini_batch == 1:
        return "the dual form needs mini_batch > 1"
    if not spec.regressor.dual:
        return f"regressor {spec.regressor.kind!r} is not built from ttr.linear (dual=True)"
    if not (spec.optimizer.linear or spec.optimizer.accumulate):
        return (
            f"optimizer {spec.optimizer.kind!r} is not linear and steps at every token; accumulate=true would make one step per mini-batch"
        )
    if spec.gate.per_key or any(s.per in ("key", "value") for s in spec.signals().values()):
        return "the dual form takes gates and signals per head only"
    if not spec.optimizer.accumulate:
        if spec.gate.projects:
            return f"gate {spec.gate.kind!r} maps the weights after every token; accumulate=true would make it once per mini-batch"
        if apart := [name for name, s in spec.signals().items() if s.per == "tensor"]:
            return f"{apart[0]} per tensor gives every weight tensor a mask of its own; accumulate=true needs none"
    if spec.separate_write_key:
        return "the dual form needs write_key=same"
    looks, reads = looks_at_weights(spec.optimizer)
    if spec.window > 1 and not looks:
        return (
            f"optimizer {spec.optimizer.kind!r} takes gradients elsewhere than at the weights: the window's pairs would each have several"
        )
    if not spec.optimizer.mirror.identity and not (looks and (reads or not spec.optimizer.accumulate)):
        where = "reads elsewhere than at the weights" if looks else "takes gradients elsewhere than at the weights"
        return f"optimizer {spec.optimizer.kind!r} {where}: mirror {spec.optimizer.mirror.kind!r} would map another point at every token"
    return None
