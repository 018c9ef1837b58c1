"""`detect_divergence`: which token of which memory stopped being finite, asked for while debugging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..state import State, flatten

if TYPE_CHECKING:
    from .arguments import Call

_wanted: ContextVar[bool] = ContextVar("ttr_detect_divergence", default=False)


@contextmanager
def detect_divergence() -> Iterator[None]:
    """Inside it every `ttr.regress` (and so every Mixer) looks at its results, and raises FloatingPointError where one is
    not finite: with the argument that brought the number, or else the first token whose output the inner loop lost.

        with ttr.detect_divergence():
            model(tokens).loss.backward()

    It waits for the device at every call, so it is for debugging. The forward pass alone is looked at, and nothing inside
    of torch.compile or torch.func transforms.
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def check(call: Call, o: Tensor, state: State) -> None:
    """Raise FloatingPointError for what is not finite, if it is asked for."""
    if torch.compiler.is_compiling():  # asked first: Dynamo knows no context variables
        return
    if not _wanted.get() or torch._C._are_functorch_transforms_active():
        return
    if _finite(o) and all(_finite(x) for x in flatten(state._trees()).values()):
        return
    given = {"q": call.q, "k": call.k, "v": call.v, "write_key": call.write_key, **call.signals, **call.params}
    given["initial_state"] = call.initial_state
    for name, x in given.items():
        parts = {name: x} if not isinstance(x, State) else {f"{name}.{n}": t for n, t in flatten(x._trees()).items()}
        for part, t in parts.items():
            # a log decay of -inf forgets all: it is the one infinity that is meant
            if isinstance(t, Tensor) and not _finite(t if name != "log_decay" else t.clamp_min(-1.0)):
                first, tokens = _first(t), t.ndim > 2 and name not in ("initial_state", *call.params)
                at = f"token {first[1]} (row {first[0]})" if tokens else f"entry {first}"
                raise FloatingPointError(f"{part}: {at} is not finite, and the memory took it up")
    optimizer, where = call.spec.optimizer, "the last state is not finite"
    if not _finite(o):
        b, t, h, _ = _first(_token_by_token(call, o))
        where = f"the output is not finite from token {t} on (row {b}, head {h})"
    raise FloatingPointError(
        f"the memory diverged while it read ({call.spec.regressor.kind}, optimizer {optimizer.kind if optimizer else None}, "
        f"mini_batch {call.spec.mini_batch}): {where}, from finite arguments. Smaller steps (optimizer.step: its scale or bias), "
        f"keys of length one (layer.qk: l2), a gate, or a shorter mini_batch keep it; ttr.diagnose shows the inner loss token by token"
    )


def _token_by_token(call: Call, o: Tensor) -> Tensor:
    """The output of a linear recurrence as the tokens follow each other: inside a chunk one that is not finite reaches those before it."""
    from ..lowering import is_linear
    from .padded import run
    from .torch.recurrent import recurrent

    if call.spec.regressor.family != "trained" or not is_linear(call.spec):
        return o
    with torch.no_grad():
        alone, _ = run(call, torch.float64 if o.dtype == torch.float64 else torch.float32, recurrent, {})
    return o if _finite(alone) else alone


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


def _first(x: Tensor) -> list[int]:
    """The first number that is not finite, along the second axis: tokens in [B, T, ...]."""
    wrong = (~torch.isfinite(x)).nonzero()
    return wrong[wrong[:, min(1, x.ndim - 1)].argmin()].tolist()
