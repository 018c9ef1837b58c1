"""What a token costs: state bytes read off a real state object, FLOPs counted on the pieces' own functions.

FLOPs are those of the mathematics, forward, leading terms, a multiply-add as 2; projections, convolutions, norms and the
signals' maps are not among them. A linear recurrence, one token at a time: 2 dk dv to predict (if the error is looked at),
1 per slot that is decayed, what the optimizer's update does, 1 for the outer product, 2 to read; delta: 6 dk dv.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..inner_optim import Signals
from ..kernels.api import regress
from ..kernels.paths import PATHS, fresh_state
from ..kernels.triton.eligible import why_not_chunks
from ..layers.sizes import head_sizes
from ..lowering import is_linear
from ..objectives import slopes
from ..spec import Spec
from ..stages import Proj


@dataclass(frozen=True)
class Sizes:
    """heads memories of dk keys and dv values, key_heads pairs of q and k; of one head where d_model is None."""

    d_model: int | None
    heads: int
    key_heads: int
    dk: int
    dv: int


def sizes(spec: Spec, d_model: int | None) -> Sizes:
    """The sizes a layer of this width gives the mathematics; without a width, those of one head of the declared size."""
    layer = spec.layer
    if d_model is None:
        dk, dv = layer.head_dim, max(1, round(layer.head_dim * layer.expand_v / layer.expand_k))
        return Sizes(None, 1, 1, _width(layer.k, dk), _width(layer.v, dv))
    s = head_sizes(spec, d_model)
    return Sizes(d_model, s.heads, s.key_heads, _width(layer.k, s.key_width), _width(layer.v, s.value_width))


def _width(stages: tuple | None, width: int) -> int:
    """The head width behind a stream's stages."""
    stages = stages or ()
    projections = [i for i, stage in enumerate(stages) if isinstance(stage, Proj)]
    for stage in stages[projections[0] + 1 :] if projections else stages:
        width = stage.width(width)
    return width


@dataclass(frozen=True)
class Costs:
    """Per layer: bytes of one sequence's state after T tokens, and what one more token costs.

    state: {what: bytes}. bytes_per_pair: what a cache grows by per token it keeps. flops_chunk: of the chunk path, per
    token, None where there is none. counted: what the figures contain, in words.
    """

    state: dict[str, int]
    state_bytes: int
    bytes_per_pair: int
    flops_per_token: int
    flops_chunk: int | None
    bytes_per_token: int
    counted: tuple[str, ...]


def costs(spec: Spec, s: Sizes, T: int, path: str) -> Costs:
    spec.regressor.check_sizes(s.dk, s.dv)
    state, per_pair = _state(spec, s, T)
    state_bytes = sum(state.values())
    family = spec.regressor.family
    chunk = None
    if family == "kernel":
        seen = spec.regressor.kept(T)  # type: ignore[attr-defined]
        flops = 2 * seen * (s.dk + s.dv)
        counted = f"the token after {T - 1} others: 2 (dk + dv) for each of the {seen} pairs it sees"
        moved = state_bytes + per_pair
    elif family == "least_squares":
        flops, counted = _least_squares(spec, s.dk, s.dv)
        moved = 2 * state_bytes
    else:
        flops, counted = _linear(spec, s.dk, s.dv) if is_linear(spec) else _trained(spec, s.dk, s.dv)
        moved = 2 * state_bytes
        if path == "chunk" or (path == "triton" and is_linear(spec) and why_not_chunks(spec) is None):
            size = inspect.signature(PATHS[family, "chunk"][0]).parameters["chunk_size"].default
            chunk, more = _chunk(spec, s.dk, s.dv, size)
            counted = f"{counted}; {more}"
    signals = sum(x.width(s.dk, s.dv, len(spec.weight_names), spec.window) for x in spec.signals().values() if not x.constant)
    streams = s.key_heads * s.dk * (1 + spec.steps * (2 if spec.separate_write_key else 1)) + s.heads * s.dv * (1 + spec.steps)
    io = 4 * (streams + s.heads * signals)
    traffic = "the cache read once and one pair written" if family == "kernel" else "the state read and written once"
    return Costs(
        state=state, state_bytes=state_bytes, bytes_per_pair=per_pair, flops_per_token=s.heads * flops,
        flops_chunk=None if chunk is None else s.heads * chunk, bytes_per_token=moved + io,
        counted=(f"FLOPs: {counted}", f"bytes: one token at a time in float32, {traffic}, {io:,} B of q, k, v, signals and o"),
    )  # fmt: skip


def _state(spec: Spec, s: Sizes, T: int) -> tuple[dict[str, int], int]:
    """{part: bytes} of a real float32 state of one sequence after T tokens, and how much a pair adds to a cache."""
    params = spec.init_params(s.heads, s.dk, s.dv)
    state = fresh_state(spec, params, 1, s.heads, s.dk, s.dv, torch.float32, "cpu")
    parts = _leaves(state.weights)
    per_pair = 0
    if spec.regressor.family == "kernel":
        q, v = torch.zeros(1, 1, s.key_heads, s.dk), torch.zeros(1, 1, s.heads, s.dv)
        _, one = regress(q, q, v, spec, params=params)
        kept = spec.regressor.kept(T)  # type: ignore[attr-defined]
        per_pair = one.nbytes - state.nbytes
        parts = {name: parts[name] + kept * (n - parts[name]) for name, n in _leaves(one.weights).items()}
    parts |= {slot: sum(_leaves(tree).values()) for slot, tree in state.slots.items()}
    if state.mini_batch:
        parts["open mini-batch"] = sum(_leaves(state.mini_batch).values())
    return parts, per_pair


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, int]:
    out: dict[str, int] = {}
    for name, x in tree.items():
        out |= _leaves(x, f"{prefix}{name}.") if isinstance(x, dict) else {f"{prefix}{name}": x.numel() * x.element_size()}
    return out


class CountFlops(TorchDispatchMode):
    """Adds up what runs under it: matrix products as torch's own counter does, elementwise operations one each."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif torch.Tag.pointwise in func.tags and isinstance(out, Tensor):
            self.total += out.numel()
        return out


def _linear(spec: Spec, dk: int, dv: int) -> tuple[int, str]:
    """One token of a linear recurrence. The error is a row [1, dv] until it meets the key: step * e costs dv, not dk dv.

    A step per key channel goes into the key, so it counts as a number.
    """
    optimizer = spec.optimizer
    s = Signals(
        {n: torch.ones(1, dv if x.per == "value" and spec.read.normalizer == "none" else 1) for n, x in optimizer.signals().items()}
    )
    dv = dv + (spec.read.normalizer != "none")
    z = tuple(torch.ones(dk, dv) for _ in range(1 + len(optimizer.slots)))
    with CountFlops() as update:
        optimizer.point(z, s)
        optimizer.update(z, torch.ones(1, dv), s)
    with CountFlops() as read:
        optimizer.read(z, s)
    looks = slopes(spec.objective, 2)[0] != 0
    decayed = sum(optimizer.decayed_slots()) if spec.gate.decays else 0
    matrices = spec.steps * (2 * looks + 1 + 2 * spec.separate_write_key) + decayed + 2
    total = matrices * dk * dv + spec.steps * update.total + read.total
    return total, f"one token at a time about {round(total / (dk * dv))} dk dv a head"


def _chunk(spec: Spec, dk: int, dv: int, C: int) -> tuple[int, str]:
    """A token of the chunk path, C tokens or E = C n events a chunk and r slots, d = r dk:

    2 E dk pair products and 2 E dv applied to errors to read, 2 n d dv into and 2 d dv out of the state; if the error looks
    at the state as many pair products per event, the solve n E (d + dv), and n (2 d dv + 2 d^2) + 2 d^2 dv / C to carry it.
    """
    n, r = spec.steps, 1 + len(spec.optimizer.slots)
    dv = dv + (spec.read.normalizer != "none")
    E, d = C * n, r * dk
    total = 2 * E * (dk + dv) + 2 * n * d * dv + 2 * d * dv
    if slopes(spec.objective, 2)[0] == 0:
        return total, f"in chunks of {C} the pair products and the state's matmuls"
    total += 2 * n * E * dk + n * E * (d + dv) + n * (2 * d * dv + 2 * d * d) + 2 * d * d * dv // C
    return total, f"in chunks of {C} the pair products, the triangular solve and the state's matmuls"


def _trained(spec: Spec, dk: int, dv: int) -> tuple[int, str]:
    """One token of the definition's arithmetic: predict and gradient at k, update, predict at q; one head, really run."""
    regressor, optimizer, objective = spec.regressor, spec.optimizer, spec.objective
    params = {name: init(1)[0] for name, init in regressor.init(dk, dv).items()}
    moving = {name: params[name] for name in regressor.state_shapes(dk, dv)}
    wide = {"key": (dk, 1), "value": (1, dv)} if spec.regressor.linear else {}
    s = Signals({n: torch.ones(wide.get(x.per, ())) for n, x in optimizer.signals().items()})
    losses = {n: torch.ones(()) for n in objective.signals()}
    x, v = torch.ones(1, dk), torch.ones(1, dv)

    def loss(w: dict[str, Tensor]) -> Tensor:
        return objective.loss(regressor.predict({**params, **w}, x)[0], v[0], Signals(losses))

    with CountFlops() as gradient:
        g = torch.func.grad(loss)(moving)
    with CountFlops() as update:
        for name, w in moving.items():
            z = (w, *optimizer.init_slots(w))
            optimizer.point(z, s)
            optimizer.update(z, g[name], s)
    with CountFlops() as read:
        regressor.predict(params, x)
    weights = sum(w.numel() for w in moving.values())
    decay = weights * sum(optimizer.decayed_slots()) if spec.gate.decays else 0
    batch = int(spec.mini_batch) if optimizer.accumulate and spec.mini_batch != "sequence" else 1
    total = spec.steps * (gradient.total * spec.window + weights * (batch > 1) + update.total // batch) + decay // batch + read.total
    return total, f"one token at a time about {total / weights:.1f} per weight of a head: predict, gradient, update, read"


def _least_squares(spec: Spec, dk: int, dv: int) -> tuple[int, str]:
    """Statistics 2 (3 with a gate) per entry of G and H, 2 dk dv to read, and the solve."""
    optimizer: Any = spec.optimizer
    per_entry = 2 + (spec.gate.decays)
    statistics = per_entry * (dk * dv + dk * dk) + 2 * dk * dv
    if optimizer.kind == "rls":
        return 6 * dk * dk + 4 * dk * dv, "one token at a time 6 dk^2 + 4 dk dv a head: the inverse and the weights by rank one"
    if optimizer.kind == "cg":
        solve, how = 2 * optimizer.iterations * dk * dk, f"{optimizer.iterations} products with H"
    else:
        solve, how = dk**3 // 3 + 2 * dk * dk, "one factorization of H"
    return statistics + solve, f"one token at a time the statistics G and H, {how}, the read"
