"""Reading a memory without writing it: M*(q), as Titans calls it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..inner_optim import Signals
from ..spec import Spec
from ..state import State


def why_no_recall(spec: Spec) -> str | None:
    """The reason for which a declaration's state alone does not say what a query reads, or None."""
    if spec.regressor.family != "trained":
        return f"regressor {spec.regressor.kind!r} is trained by no optimizer"
    if spec.read.normalizer != "none":
        return f"read.normalizer={spec.read.normalizer!r} counts what was read"
    if spec.optimizer.position != "none":
        return f"optimizer.position={spec.optimizer.position!r} weighs by the place in the mini-batch"
    return None


def recall(q: Tensor, spec: Spec, state: State, params: Mapping[str, Tensor]) -> Tensor:
    """o_t = f(scale q_t) at the weights that `state` holds, for every t: the state is left as it is.

    q: [B, T, H, dk]; params: as `ttr.regress` takes them. Returns [B, T, Hv, dv] in q's dtype. Differentiable.
    """
    optimizer, regressor, none = spec.optimizer, spec.regressor, Signals({})
    slots = [state.slots[slot] for slot in optimizer.slots]
    weights = {name: optimizer.read((w, *(slot[name] for slot in slots)), none) for name, w in state.weights.items()}
    some = next(iter(weights.values()))
    outer = {name: params[name].to(some.dtype) for name in regressor.outer if name in params}
    x = (q.to(some.dtype) * spec.scale(q.shape[-1])).transpose(1, 2)
    x = x.repeat_interleave(some.shape[1] // x.shape[1], 1)  # key heads are shared by groups of memories

    def one_head(w: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        return regressor.predict({**{name: optimizer.mirror(x) for name, x in w.items()}, **outer}, x)

    with torch.autocast(q.device.type, enabled=False):  # as the state's own paths do
        o = torch.func.vmap(torch.func.vmap(one_head), in_dims=(0, None, 0))(weights, outer, x)
    return o.transpose(1, 2).to(q.dtype)
