"""Which function runs a path, for each family of regressors."""

from __future__ import annotations

from torch import Tensor

from ..inner_loop import complete_state, definition
from ..inner_loop import initial_state as trained_state
from ..spec import Spec
from ..state import State
from .torch import attention, least_squares
from .torch.chunk import chunk
from .torch.dual import dual
from .torch.recurrent import recurrent

# (family, path) -> (function, its options)
PATHS = {
    ("trained", "definition"): (definition, ()),
    ("trained", "recurrent"): (recurrent, ()),
    ("trained", "chunk"): (chunk, ("chunk_size",)),
    ("trained", "dual"): (dual, ("compile",)),
    ("least_squares", "definition"): (least_squares.definition, ()),
    ("least_squares", "recurrent"): (least_squares.recurrent, ()),
    ("least_squares", "chunk"): (least_squares.chunk, ("chunk_size",)),
    ("kernel", "definition"): (attention.definition, ()),
    ("kernel", "sdpa"): (attention.sdpa, ()),
}

TAKE_GRADIENTS = (definition, dual)  # call torch.func.grad while they read


def fresh_state(spec: Spec, params: dict[str, Tensor], n: int, n_heads: int, dk: int, dv: int, dtype, device) -> State:
    """The memory before the first token, as `ttr.regress` gives it out."""
    make = {"least_squares": least_squares.initial_state, "kernel": attention.initial_state}.get(spec.regressor.family)
    if make is not None:
        return make(spec, params, n, n_heads, dk, dv, dtype, device)
    state = trained_state(spec, params, n, n_heads, dk, dv, dtype, device)
    if spec.read.normalizer == "none":
        return state
    w = state.weights["W"]
    return complete_state(spec, {"W": w, "normalizer": w.new_zeros(n, n_heads, dk, 1)}, dk, dv)
