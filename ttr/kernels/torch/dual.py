"""The dual form: all tokens of a mini-batch at once, without a copy of the weights per token.

Gradients of a mini-batch are taken at its first weights, so event e writes the outer product x_e d_e^T into every
linear layer (x its input, d the loss's gradient at its output), and the layer as token t reads it is

    y_t = sum_k Q0_tk h_t Z_k + sum_e R_te (h_t . x_e) d_e          Z_k: the slots when the mini-batch began

masked attention with the read mask R of the probed optimizer in place of the causal mask. Under a window (the Omega rule)
e runs over pairs, those of earlier tokens among them, and R B takes R's place, B the band of the window's weights. Where a
mirror maps the weights before they predict, those of each token of the mini-batch are made. Mini-batches follow one another;
backward keeps the states between groups of them and makes the rest again. Source: the dual form of TTT (2407.04620,
section 2.5), here for any linear optimizer and any depth.

A call in bf16 multiplies h Z, h x^T, (R * h x^T) d, x^T d and what an optimizer makes of matrices with operands in bf16, forward
and backward; weights and slots, to which x^T d is added, masks, norms and losses are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from ...inner_loop import InnerLoop, concatenate, reopened
from ...inner_optim import Signals
from ...lowering import Coefficients, coefficients, effective_signals, keep_factor, looks_at_weights, slots_seen
from ...operands import product
from ...spec import Spec
from ...state import State, map_tensors
from ..problem import Problem
from .chunk import sum_of
from .compiled import compiled_once
from .dual_weights import Looked, Made, Moved, Slots
from .masks import masks
from .recompute import recomputed
from .together import Together

Weights = dict[str, Tensor]
Run = Callable[[dict, dict, Weights], tuple[Tensor, dict]]


def dual(problem: Problem, compile: bool = False) -> tuple[Tensor, State]:
    """(o [N, H, T, dv], state). Sequences that differ in length or in the position of their mini-batch run one by one.

    compile: whole mini-batches run through `torch.compile`, once compiled (minutes) for all of their kind; the rest does not.
    """
    if not isinstance(compile, bool):
        raise ValueError(f"path: compile={compile!r}, expected true or false")
    if compile and not isinstance(problem.spec.mini_batch, int):
        raise ValueError(f"path: compile=true takes whole mini-batches, which mini_batch={problem.spec.mini_batch!r} never has")
    positions = problem.positions
    if problem.lengths is None and len(set(positions)) == 1:
        return _together(problem, positions[0], compile)
    parts = []
    for i, position in enumerate(positions):
        one = problem.sequence(i)
        o, state = _together(one, position, compile) if one.q.shape[2] else (one.v[:, :, :, 0], one.state)
        parts.append((torch.nn.functional.pad(o, (0, 0, 0, problem.q.shape[2] - o.shape[2])), state))
    return torch.cat([o for o, _ in parts]), concatenate([s for _, s in parts])


FEW = 16  # tokens, one tile of a tensor core: for fewer, rounding the weights takes longer than it saves
KEPT = 8  # up to so many mini-batches backward finds the whole graph of; longer sequences are run again in groups
TOKEN_AXIS = {"A": -4, "b": -4, "c": -4, "read": -3}  # of the coefficients; everything else is [N, H, T, ...]


def _together(problem: Problem, position: int, compile: bool) -> tuple[Tensor, State]:
    spec, T = problem.spec, problem.q.shape[2]
    gathered = {name: x for name, x in problem.state.mini_batch.items() if name != "position"}
    memory: dict[str, dict] = {"weights": problem.state.weights, "slots": problem.state.slots, "mini_batch": gathered}
    size = spec.mini_batch if isinstance(spec.mini_batch, int) else position + T
    lengths = _mini_batches(T, size, position)
    several = len(lengths) if len(lengths) <= KEPT else isqrt(len(lengths) - 1) + 1
    groups = [lengths[i : i + several] for i in range(0, len(lengths), several)]
    outputs = []
    for tokens, group in zip(_cut(_tokens(problem), [sum(group) for group in groups]), groups, strict=True):
        run = partial(_group, spec, group, position, compile, problem.operands)
        o, memory = recomputed(run, tokens, memory, problem.params) if len(groups) > 1 else run(tokens, memory, problem.params)
        outputs.append(o)
        position = (position + sum(group)) % size
    if not isinstance(spec.mini_batch, int):
        position = size
    if position == 0 and "start" in memory["mini_batch"]:  # the weights themselves, but `decode` updates those in place
        memory["mini_batch"]["start"] = map_tensors(Tensor.clone, memory["mini_batch"]["start"])
    memory["mini_batch"]["position"] = torch.full_like(problem.state.mini_batch["position"], position)
    return torch.cat(outputs, 2), State(**memory, spec_hash=spec.hash)


def _mini_batches(T: int, size: int, position: int) -> list[int]:
    """How many tokens of each, of which the first is open at `position`."""
    first = min(T, size - position)
    whole, rest = divmod(T - first, size)
    return [first] + [size] * whole + [rest] * (rest > 0)


def _tokens(problem: Problem) -> dict[str, Any]:
    """All that comes token by token."""
    spec, values = problem.spec, effective_signals(problem)
    tokens: dict[str, Any] = {"q": problem.q, "k": problem.k, "v": problem.v, "signals": values}
    if problem.log_decay is not None:
        tokens["log_decay"] = problem.log_decay
    if not spec.optimizer.accumulate:
        probed = coefficients(spec, values, keep_factor(problem), (*problem.q.shape[:3], spec.steps), look_first=False)
        tokens |= {name: getattr(probed, name) for name in TOKEN_AXIS}
    return tokens


def _masks(spec: Spec, tokens: dict[str, Any], lengths: list[int]) -> list[dict[str, Tensor]]:
    """The numbers of every mini-batch; those of one length after another are made at once."""
    if spec.optimizer.accumulate:
        return [{} for _ in lengths]
    N, out = tokens["q"].shape[0], []
    runs = [(length, len(list(alike))) for length, alike in groupby(lengths)]
    pieces = zip(*(tokens[name].split([m * n for m, n in runs], axis) for name, axis in TOKEN_AXIS.items()), strict=True)
    for (length, count), piece in zip(runs, pieces, strict=True):
        laid = {  # [..., N, H, T, ...] -> [..., N mini-batches, H, tokens, ...]
            name: x.unflatten(axis, (count, length)).movedim(axis - 1, axis - 2).flatten(axis - 3, axis - 2)
            for (name, axis), x in zip(TOKEN_AXIS.items(), piece, strict=True)
        }
        made = masks(spec, Coefficients(**laid))
        each = {name: x.unflatten(0, (N, count)).unbind(1) for name, x in made.items()}
        out += [{name: x[i] for name, x in each.items()} for i in range(count)]
    return out


def _cut(tokens: dict[str, Any], lengths: list[int]) -> list[dict[str, Any]]:
    """The tokens of consecutive pieces. One split of each tensor: its gradient is one concatenation."""
    pieces: list[dict[str, Any]] = [{} for _ in lengths]
    for name, x in tokens.items():
        parts = _cut(x, lengths) if isinstance(x, dict) else x.split(lengths, TOKEN_AXIS.get(name, 2))
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part
    return pieces


def _group(
    spec: Spec, lengths: list[int], position: int, compile: bool, operands: torch.dtype | None,
    tokens: dict, memory: dict, params: Weights,
) -> tuple[Tensor, dict]:  # fmt: skip
    """Consecutive mini-batches of all heads, the first of them open at `position`."""
    outputs = []
    for length, own, numbers in zip(lengths, _cut(tokens, lengths), _masks(spec, tokens, lengths), strict=True):
        part = {"q": own["q"], "k": own["k"].flatten(2, 3), "v": own["v"].flatten(2, 3), **numbers}
        part["signals"] = {name: s.flatten(2, 3).flatten(3) for name, s in own["signals"].items()}  # [N, H, events, 1 or tensors]
        if "log_decay" in own:
            part["log_decay"] = own["log_decay"]
        closes = position + length == spec.mini_batch
        rounded = operands if length >= FEW else None
        whole = compile and closes and position == 0
        run = compiled(spec, rounded) if whole else heads(spec, position, closes, rounded)
        o, memory = run(part, memory, params)
        outputs.append(o)
        position = 0 if closes else position + length
    return torch.cat(outputs, 2), memory


def heads(spec: Spec, position: int, closes: bool, operands: torch.dtype | None) -> Run:
    """`MiniBatch.run` on [N, H, ...]."""
    return vmap(vmap(MiniBatch(spec, position, closes, operands).run), in_dims=(0, 0, None))


@cache
def compiled(spec: Spec, operands: torch.dtype | None) -> Run:
    """The same for a whole mini-batch, compiled."""
    return compiled_once(heads(spec, 0, True, operands), f"the mini-batch of {spec.name or spec.regressor.kind}")


def _seen(z: dict, rows: Callable[[str], Tensor], plain: bool, which: tuple[int, ...]) -> dict[str, tuple[Slots, Tensor | None]]:
    """Of every weight tensor the slots that are seen and their rows; plain: the weights alone, as they are.

    Slots whose factor is zero by the optimizer's making are left out: each would be a product of matrices, and a NaN in it seen.
    """
    if plain:
        return {name: (zs[:1], None) for name, zs in z.items()}
    return {name: (tuple(zs[i] for i in which), rows(name)[list(which)]) for name, zs in z.items()}


class MiniBatch:
    """One mini-batch (or the part of it that is at hand) of one head. operands: of large products; None: as they are."""

    def __init__(self, spec, position: int, closes: bool, operands: torch.dtype | None):
        self.spec, self.position, self.closes, self.operands = spec, position, closes, operands
        self.product = partial(product, operands=operands)
        (self.looks, self.reads), (self.looked, self.read) = looks_at_weights(spec.optimizer), slots_seen(spec.optimizer)

    def run(self, part: dict, memory: dict, params: Weights) -> tuple[Tensor, dict]:
        loop = Together(self.spec, params)
        z = loop._slots(memory)
        open_ = memory["mini_batch"]
        if self.spec.optimizer.accumulate:
            return self._accumulate(loop, part, z, open_)
        start = z if self.position == 0 else loop._slots(open_["start"])
        part, window = self._look_back(part, open_.get("window"))
        if window is not None:
            part |= {"R": part["R"] @ part["band"], "F": part["F"] @ part["band"]}
        inputs, gradients = self._gradients(loop, part, start, lambda name: part["c"])
        mask, rows, slots = part["R"], part["Q0"], z
        if self.spec.optimizer.position != "none":  # W_start + c_i (W_i - W_start): the start is one more slot
            factor = loop.factors(self.position, part["q"].shape[0], mask)
            mask, rows = factor[:, None] * mask, torch.cat([factor * rows, (1 - factor)[None]])
            slots = {name: (*zs, start[name][0]) for name, zs in z.items()}
        read = self._moved if loop.optimizer.mirror.identity else self._made
        weights = read(slots, rows, mask, inputs, gradients)
        o = self.spec.regressor.predict({**weights, **loop.outer}, part["q"])
        end = self._advance(part, z, inputs, gradients)
        if self.closes and self.spec.optimizer.position != "none":
            end = {name: (start[name][0] + factor[-1] * (w - start[name][0]),) for name, (w,) in end.items()}
        open_ = {"start": loop._memory(end if self.closes else start)} | ({} if window is None else {"window": window})
        return o, {**loop._memory(end), "mini_batch": open_}

    def _look_back(self, part: dict, before: Weights | None) -> tuple[dict, Weights | None]:
        """The part with pairs, the earliest first, in place of its events, and the pairs the next part looks back to.

        band: [events, pairs], the weight of a pair in an event's gradient, which is taken at the weights.
        """
        if before is None:
            return part, None
        events, back = part["k"].shape[0], self.spec.window - 1
        ones = torch.ones_like(part["q"][:1, 0]).expand(events)
        own = {"k": part["k"], "v": part["v"], "real": ones}
        pairs = {name: torch.cat([before[name].flip(0), x]) for name, x in own.items()}
        lag = torch.arange(events, device=ones.device)[:, None] + back - torch.arange(events + back, device=ones.device)
        weights = part["signals"]["window_weight"].expand(events, back + 1)
        band = torch.where((lag >= 0) & (lag <= back), weights.gather(1, lag.clamp(0, back)), 0) * pairs["real"]
        latest = {name: x.flip(0)[:back] for name, x in pairs.items()}
        return {**part, "k": pairs["k"], "v": pairs["v"], "band": band}, latest

    def _moved(self, slots: dict, rows: Tensor, mask: Tensor, inputs: dict, gradients: Weights) -> dict[str, Moved]:
        written = {name: (mask, x, gradients[name]) for name, (x, _) in inputs.items()}
        return {name: Moved(zs, rows, written.get(name), self.product) for name, zs in slots.items()}

    def _made(self, slots: dict, rows: Tensor, mask: Tensor, inputs: dict, gradients: Weights) -> dict[str, Made]:
        stored = {name: torch.einsum("kt,k...->t...", rows, torch.stack(zs)) for name, zs in slots.items()}
        for name, (x, bias) in inputs.items():
            d = gradients[name]
            stored[name] = stored[name] + torch.einsum("te,eio->tio", mask, x[:, :, None] * d[:, None])
            if bias is not None:
                stored[bias] = stored[bias] + mask @ d
        return {name: Made(vmap(self.spec.optimizer.mirror)(w)) for name, w in stored.items()}

    def _gradients(self, loop: InnerLoop, part: dict, start: dict, rows: Callable[[str], Tensor]):
        """Inputs of every linear layer at the start weights and the loss's gradients at its outputs, event by event.

        rows: of a weight tensor, how the gradient's point is made of the slots; a mirror is of the weights alone.
        """
        start = _seen(self._mirrored(loop, start), rows, self.looks, self.looked)
        seen = {} if "band" in part else {n: s[:, 0] for n, s in part["signals"].items()}  # a window's losses have no signals
        events = part["k"].shape[0]
        shapes = {name: zs[0].shape[-1] for name, (zs, _) in start.items() if zs[0].ndim == 2}
        taps = {name: part["k"].new_zeros(events, width) for name, width in shapes.items()}

        biases: dict[str, str | None] = {}

        def loss(taps):
            inputs: dict[str, tuple[Tensor, str | None]] = {}
            weights = {name: Looked(name, zs, c, taps, inputs, self.product) for name, (zs, c) in start.items()}
            f = self.spec.regressor.predict({**weights, **loop.outer}, part["k"])
            each = vmap(lambda p, v, s: self.spec.objective.loss(p, v, Signals(s)))(f, part["v"], seen)
            biases.update({name: bias for name, (_, bias) in inputs.items()})
            return each.sum(), {name: x for name, (x, _) in inputs.items()}

        gradients, inputs = grad(loss, has_aux=True)(taps)
        return {name: (x, biases[name]) for name, x in inputs.items()}, gradients

    def _mirrored(self, loop: InnerLoop, z: dict) -> dict:
        """The slots with the weights that predict in place of those that are stored."""
        weights = loop.mirrored({name: zs[0] for name, zs in z.items()})
        return {name: (weights[name], *zs[1:]) for name, zs in z.items()}

    def _advance(self, part: dict, z: dict, inputs: dict, gradients: Weights) -> dict:
        """The slots after the part: z_k <- sum_l phi_kl z_l + sum_e F_ek g_e."""
        phi, F = part["phi"], part["F"]
        r = phi.shape[0]
        end = {name: [sum_of(phi[i, j] * zs[j] for j in range(r)) for i in range(r)] for name, zs in z.items()}
        for name, (x, bias) in inputs.items():
            for i in range(r):
                weighted = F[i][:, None] * gradients[name]
                end[name][i] = end[name][i] + self.product(x.mT, weighted)
                if bias is not None:
                    end[bias][i] = end[bias][i] + weighted.sum(0)
        return {name: tuple(zs) for name, zs in end.items()}

    def _of(self, loop: InnerLoop, signals: dict[str, Tensor], weight: str, every: int) -> Signals:
        """A weight tensor's own signals, each [events]; of every so many, the first micro-steps'."""
        i, apart = loop.apart.get(weight, (0, ()))
        return Signals({name: s[::every, i if name in apart else 0] for name, s in signals.items()})

    def _accumulate(self, loop: InnerLoop, part: dict, z: dict, open_: dict) -> tuple[Tensor, dict]:
        """Queries read the weights from before the mini-batch; its gradients are summed and stepped on once, at its end."""
        optimizer, n = self.spec.optimizer, self.spec.steps
        window = open_.get("window")
        open_ = {name: x for name, x in open_.items() if name != "window"}
        if self.position == 0:
            open_ = reopened(open_)
        events, tokens = ({w: self._of(loop, part["signals"], w, every) for w in z} for every in (1, n))
        units = torch.eye(1 + len(optimizer.slots), dtype=part["q"].dtype, device=part["q"].device)
        one = part["q"].new_ones(part["q"].shape[0])
        event = part["k"].new_ones(part["k"].shape[0])

        def look(name: str) -> Tensor:
            return torch.stack([optimizer.point(tuple(u), events[name]) * event for u in units.T])

        def read(name: str) -> Tensor:
            return torch.stack([optimizer.read(tuple(u), tokens[name]) * one for u in units.T])

        seen = _seen(self._mirrored(loop, z), read, self.reads, self.read)
        seen = {name: Moved(zs, rows, None, self.product) for name, (zs, rows) in seen.items()}
        o = self.spec.regressor.predict({**seen, **loop.outer}, part["q"])
        part, window = self._look_back(part, window)
        inputs, gradients = self._gradients(loop, part, z, look)
        weighting = "weight" if "weight" in optimizer.signals() else "step"
        weights = {w: getattr(s, weighting) for w, s in events.items()}
        if window is not None:
            weights = {name: x @ part["band"] for name, x in weights.items()}
        total = dict(open_["gradient"])
        for name, (x, bias) in inputs.items():
            total[name] = total[name] + self.product(x.mT, weights[name][:, None] * gradients[name])
            if bias is not None:
                total[bias] = total[bias] + weights[bias] @ gradients[name]
        open_ = {
            "gradient": total,
            "signals": {name: open_["signals"][name] + part["signals"][name].sum(0)[:, None] for name in optimizer.signals()},
            "kept": open_["kept"] * torch.exp(part["log_decay"].sum(0)) if "log_decay" in part else open_["kept"],
        }
        if self.closes:
            z = loop._step_once(z, open_, self.operands)
        if window is not None:
            open_["window"] = window
        return o, {**loop._memory(z), "mini_batch": open_}
