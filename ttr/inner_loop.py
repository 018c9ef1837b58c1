"""THE DEFINITION: what a declaration means, one token at a time. Slow, exact, for every spec; every path must agree.

    o_t before, if read: before
    for j in micro-steps:
        z~ = gate(z) if j == 0 else z                      # decays what the optimizer says, normally z[0]
        s  = signals of (t, j), step <- step_rule(step, k)
        p  = mirror(point(z~ if order == first else z, s)) # the mini-batch's start instead, if mini_batch > 1
        g  = torch.func.grad(objective)(p; k, v)           # never written by hand here; of a window, the weighted sum
        z  = update(z~, g, s)                              # or once per mini-batch on the sum of weight * g
        z[0] = project(z[0], what it was), if the gate projects
    o_t = predict(mirror(read(z, s)), q_t), if read: after

One head at a time, batch and heads by torch.func.vmap. Nobody optimises this file. The least-squares and kernel
regressors take no gradient; their definitions are in least_squares.py and kernels/torch/attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, vmap

from .inner_optim import Optimizer, Signals
from .kernels.problem import Problem
from .objectives import slopes
from .spec import Spec
from .state import State, map_tensors

Weights = dict[str, Tensor]


def initial_state(spec: Spec, params: Weights, n: int, n_heads: int, dk: int, dv: int, dtype, device) -> State:
    """The memory of n sequences before their first token, for a regressor that an optimizer trains."""
    return complete_state(spec, initial_weights(spec, params, n, n_heads, dk, dv, dtype, device), dk, dv)


def initial_weights(spec: Spec, params: Weights, n: int, n_heads: int, dk: int, dv: int, dtype, device) -> Weights:
    """Each [n, n_heads, ...], in memory once for all n."""
    init = spec.regressor.init(dk, dv)
    return {
        name: (params[name] if init[name].learned else init[name](n_heads, device=device)).to(device, dtype).expand(n, n_heads, *shape)
        for name, shape in spec.regressor.state_shapes(dk, dv).items()
    }


def initial_slots(spec: Spec, weights: Weights) -> dict[str, Weights]:
    """What the optimizer carries beside the weights before their first gradient, by slot and weight."""
    optimizer: Optimizer = spec.optimizer
    slots: dict[str, Weights] = {slot: {} for slot in optimizer.slots}
    for name, w in weights.items():
        for slot, value in zip(optimizer.slots, optimizer.init_slots(w), strict=True):
            slots[slot][name] = value
    return slots


def complete_state(spec: Spec, weights: Weights, dk: int, dv: int) -> State:
    """Fresh optimizer slots, an empty mini-batch and no pairs to look back to around the given weights, each [N, H, ...]."""
    optimizer: Optimizer = spec.optimizer
    slots = initial_slots(spec, weights)
    some = next(iter(weights.values()))
    mini_batch: dict = {}
    if spec.mini_batch != 1:
        mini_batch["position"] = torch.zeros(some.shape[0], dtype=torch.int64, device=some.device)
        if optimizer.accumulate:
            zero = some.new_zeros(some.shape[:2])
            mini_batch["gradient"] = {name: torch.zeros_like(w) for name, w in weights.items()}
            mini_batch["signals"] = {
                name: zero[..., None, None].expand(*zero.shape, *_widths(s.per, dk, weights)) for name, s in optimizer.signals().items()
            }
            mini_batch["kept"] = torch.ones_like(zero)[..., None].expand(*zero.shape, dk if spec.gate.per_key else 1)
        else:
            mini_batch["start"] = {"weights": weights, "slots": slots}
    if spec.window > 1:  # the latest first; real: 1, or 0 where there was no token yet
        lead = (*some.shape[:2], spec.window - 1)
        mini_batch["window"] = {"k": some.new_zeros(*lead, dk), "v": some.new_zeros(*lead, dv), "real": some.new_zeros(lead)}
    return State(weights=weights, slots=slots, mini_batch=mini_batch, spec_hash=spec.hash)


def _widths(per: str, dk: int, weights: Weights) -> tuple[int, int]:
    wide = {"key": (dk, 1), "value": (1, weights["W"].shape[-1] if "W" in weights else 1), "tensor": (len(weights), 1)}
    return wide.get(per, (1, 1))


def definition(problem: Problem) -> tuple[Tensor, State]:
    """Run the definition: (o [N, H, T, dv], state). Sequences that differ in length or position run one by one."""
    positions = problem.positions
    if problem.lengths is None and len(set(positions)) == 1:
        return _together(problem, positions[0])
    parts = []
    for i in range(problem.q.shape[0]):
        one = problem.sequence(i)
        if one.q.shape[2] == 0:  # an empty sequence keeps its state
            parts.append((problem.v.new_zeros(1, *problem.v.shape[1:3], problem.v.shape[-1]), one.state))
            continue
        o, state = _together(one, positions[i])
        parts.append((torch.nn.functional.pad(o, (0, 0, 0, problem.q.shape[2] - o.shape[2])), state))
    return torch.cat([o for o, _ in parts]), concatenate([s for _, s in parts])


def concatenate(states: list[State]) -> State:
    """One state of several, along the batch axis."""

    def join(*trees):
        return {k: join(*(t[k] for t in trees)) for k in trees[0]} if isinstance(trees[0], dict) else torch.cat(trees)

    return states[0]._with(join(*(s._trees() for s in states)))


def _together(problem: Problem, position: int) -> tuple[Tensor, State]:
    spec, state = problem.spec, problem.state
    tokens = {"q": problem.q, "k": problem.k, "v": problem.v, "signals": problem.signals}
    if problem.write_key is not None:
        tokens["write_key"] = problem.write_key
    if problem.log_decay is not None:
        tokens["log_decay"] = problem.log_decay
    memory = {"weights": state.weights, "slots": state.slots}
    memory["mini_batch"] = {k: v for k, v in state.mini_batch.items() if k != "position"}

    def one_head(tokens, memory, params):
        return InnerLoop(spec, params).run(tokens, memory, position)

    o, memory = vmap(vmap(one_head), in_dims=(0, 0, None))(tokens, memory, problem.params)
    if "position" in state.mini_batch:
        t = position + problem.q.shape[2]
        t = t % spec.mini_batch if isinstance(spec.mini_batch, int) else t
        memory["mini_batch"]["position"] = torch.full_like(state.mini_batch["position"], t)
    return o, State(**memory, spec_hash=spec.hash)


class InnerLoop:
    """The loop of one head. z is {weight name: (w, *slots)}."""

    def __init__(self, spec: Spec, params: Weights):
        self.spec = spec
        self.optimizer: Optimizer = spec.optimizer
        self.params = params
        self.outer = {name: params[name] for name in spec.regressor.outer if name in params}
        apart = [name for name, s in self.optimizer.signals().items() if s.per == "tensor"]
        self.apart = {weight: (i, apart) for i, weight in enumerate(spec.weight_names)} if apart else {}

    def run(self, tokens: dict, memory: dict, position: int) -> tuple[Tensor, dict]:
        spec, optimizer = self.spec, self.optimizer
        z = self._slots(memory)
        open_ = dict(memory["mini_batch"])
        window = open_.pop("window", None)
        start = self._slots(open_["start"]) if "start" in open_ else z
        outputs = []
        for t in range(tokens["q"].shape[0]):
            if position == 0:
                start = z
                if optimizer.accumulate:
                    open_ = reopened(open_)
            if spec.read.at == "before":
                outputs.append(self._predict(self.mirrored(self._read(z, self._signals(tokens, t, 0))), tokens["q"][t]))
            keep = torch.exp(tokens["log_decay"][t]) if "log_decay" in tokens else None
            for j in range(spec.steps):
                s = self._signals(tokens, t, j)
                decayed = self._gate(z, keep) if j == 0 else z
                source = start if spec.mini_batch != 1 else decayed if spec.gate.order == "first" else z
                p = self.mirrored({name: optimizer.point(slots, self.own(s, name)) for name, slots in source.items()})
                if window is None:
                    g = self._gradient(p, tokens, t, j, s)
                else:
                    pairs = {"k": tokens["k"][t], "v": tokens["v"][t], "real": torch.ones_like(window["real"][:1])}
                    pairs = {name: torch.cat([x, window[name]]) for name, x in pairs.items()}
                    g = self._gradient_of_window(p, pairs, s)
                    window = {name: x[:-1] for name, x in pairs.items()}
                if optimizer.accumulate:
                    open_ = self._gather(open_, g, s, keep if j == 0 else None)
                else:
                    before = z
                    z = {name: optimizer.updated(decayed[name], g[name], self.own(s, name)) for name in z}
                    if spec.separate_write_key:
                        z = self._write(z, p, tokens, t, j, s)
                    z = self._project(z, before)
            position += 1
            read = self._read(z, s)
            if optimizer.position != "none":
                read = {name: start[name][0] + self.factors(position - 1, 1, w) * (w - start[name][0]) for name, w in read.items()}
            if spec.read.at == "after":
                outputs.append(self._predict(self.mirrored(read), tokens["q"][t]))
            if position == spec.mini_batch:
                position = 0
                if optimizer.accumulate:
                    z = self._step_once(z, open_)
                elif optimizer.position != "none":
                    z = {name: (read[name],) for name in z}
        if spec.mini_batch != 1 and not optimizer.accumulate:
            # none is open: the next one starts here, in tensors of its own, as `decode` updates the weights in place
            open_ = {"start": self._memory(start) if position else map_tensors(torch.clone, self._memory(z))}
        if window is not None:
            open_["window"] = window
        return torch.stack(outputs), {**self._memory(z), "mini_batch": open_}

    def _slots(self, memory: dict) -> dict[str, tuple[Tensor, ...]]:
        return {name: (w, *(memory["slots"][slot][name] for slot in self.optimizer.slots)) for name, w in memory["weights"].items()}

    def _memory(self, z: dict[str, tuple[Tensor, ...]]) -> dict:
        slots = {slot: {name: zs[i + 1] for name, zs in z.items()} for i, slot in enumerate(self.optimizer.slots)}
        return {"weights": {name: zs[0] for name, zs in z.items()}, "slots": slots}

    def own(self, s: Signals, weight: str) -> Signals:
        """The signals of one weight tensor, of those that are declared per tensor its own entry."""
        if not self.apart:
            return s
        i, names = self.apart[weight]
        return s.replace(**{name: getattr(s, name).flatten()[i] for name in names})

    def _project(self, z: dict, before: dict) -> dict:
        """What the gate makes of the weights after an update."""
        gate = self.spec.gate
        if not gate.projects:
            return z
        return {name: (gate.project(w, before[name][0]), *slots) for name, (w, *slots) in z.items()}

    def mirrored(self, w: Weights) -> Weights:
        """The weights that predict, of those that are stored."""
        return {name: self.optimizer.mirror(x) for name, x in w.items()}

    def _shape(self, s: Tensor) -> Tensor:
        """[d1, d2] broadcasts against the matrix of a linear regressor; elsewhere a number is a number."""
        return s if self.spec.regressor.linear or s.numel() > 1 else s.reshape(())

    def _signals(self, tokens: dict, t: int, j: int) -> Signals:
        values = {name: s[t, j] for name, s in tokens["signals"].items()}
        if self.optimizer.step_rule.kind != "plain":
            curvature, _ = slopes(self.spec.objective, tokens["v"].shape[-1])
            values["step"] = self.optimizer.step_rule.effective(values["step"], tokens["k"][t, j][:, None], curvature)
        return Signals({name: self._shape(s) for name, s in values.items()})

    def _gate(self, z: dict, keep: Tensor | None) -> dict:
        if keep is None:
            return z
        regressor = self.spec.regressor
        decays = self.optimizer.decayed_slots()

        def factor(name: str) -> Tensor | None:
            if keep.shape[-1] == 1:
                return keep.reshape(())
            return keep[:, None] if name in regressor.key_axis() else None  # per key channel: the tensors the key enters

        out = {}
        for name, slots in z.items():
            f = factor(name)
            out[name] = slots if f is None else tuple(x * f if d else x for x, d in zip(slots, decays, strict=True))
        return out

    def _predict(self, w: Weights, x: Tensor) -> Tensor:
        return self.spec.regressor.predict({**w, **self.outer}, x)

    def _read(self, z: dict, s: Signals) -> Weights:
        return {name: self.optimizer.read(slots, self.own(s, name)) for name, slots in z.items()}

    def _gradient(self, p: Weights, tokens: dict, t: int, j: int, s: Signals) -> Weights:
        k, v = tokens["k"][t, j], tokens["v"][t, j]
        if self.spec.separate_write_key:  # the first term of 1/2 ||f(k)||^2 - <f(k_w), v>
            v = torch.zeros_like(v)
        return grad(lambda w: self.spec.objective.loss(self._predict(w, k), v, s))(p)

    def _gradient_of_window(self, p: Weights, pairs: Weights, s: Signals) -> Weights:
        """Of the losses of the last pairs, the latest first, weighted and summed."""
        weight = s.window_weight.flatten().expand(self.spec.window) * pairs["real"]

        def loss(w):
            return (weight * vmap(lambda k, v: self.spec.objective.loss(self._predict(w, k), v, s))(pairs["k"], pairs["v"])).sum()

        return grad(loss)(p)

    def _write(self, z: dict, p: Weights, tokens: dict, t: int, j: int, s: Signals) -> dict:
        """Add the second term's update, which `step` does not touch: update(0, g, step = 1), the optimizer being linear."""
        k, v = tokens["write_key"][t, j], tokens["v"][t, j]
        loss = self.spec.objective.loss

        def second(w):
            f = self._predict(w, k)
            return loss(f, v, s) - loss(f, torch.zeros_like(v), s)

        g = grad(second)(p)
        unit = s.replace(step=torch.ones_like(s.step))
        out = {}
        for name, slots in z.items():
            zero = tuple(torch.zeros_like(x) for x in slots)
            added = self.optimizer.update(zero, g[name], unit)
            out[name] = tuple(x + dx for x, dx in zip(slots, added, strict=True))
        return out

    def factors(self, position: int, tokens: int, like: Tensor) -> Tensor:
        """c_i = max(0, 1/i + delta_i), i = position + 1, ..., within the mini-batch (TTT): [tokens], of all heads [H, tokens]."""
        mean = 1.0 / torch.arange(position + 1, position + 1 + tokens, dtype=like.dtype, device=like.device)
        if self.optimizer.position == "mean":
            return mean
        return torch.clamp(mean + self.params["position"][..., position : position + tokens], min=0)

    def _gather(self, open_: dict, g: Weights, s: Signals, keep: Tensor | None) -> dict:
        """Add one event to the open mini-batch. An optimizer without a weight of its own is weighted by its step."""
        names = self.optimizer.signals()
        weighting = "weight" if "weight" in names else "step"
        return {
            "gradient": {name: open_["gradient"][name] + getattr(self.own(s, name), weighting) * g[name] for name in g},
            "signals": {name: open_["signals"][name] + getattr(s, name) for name in names},
            "kept": open_["kept"] if keep is None else open_["kept"] * keep,
        }

    def _step_once(self, z: dict, open_: dict, operands: torch.dtype | None = None) -> dict:
        """One update on the mini-batch's weighted sum; its rates are the means over the mini-batch.

        operands: of the optimizer's own large products, which a faster path may round.
        """
        count = int(self.spec.mini_batch) * self.spec.steps
        means = {name: self._shape(total / count) for name, total in open_["signals"].items()}
        weighting = "weight" if "weight" in means else "step"
        means[weighting] = torch.ones_like(means[weighting])  # it is in the sum
        s, decayed = Signals(means, operands), self._gate(z, open_["kept"])
        own = {name: self.own(s, name) for name in decayed}
        return self._project(self.updated(decayed, open_["gradient"], own), z)

    def updated(self, z: dict, gradients: Weights, signals: dict[str, Signals]) -> dict:
        """The slots of every weight tensor after an update, each by its own signals."""
        return {name: self.optimizer.updated(zs, gradients[name], signals[name]) for name, zs in z.items()}


def reopened(open_: dict) -> dict:
    """The accumulators of a mini-batch that has gathered nothing yet."""

    def zero(tree):
        return {k: zero(v) for k, v in tree.items()} if isinstance(tree, dict) else torch.zeros_like(tree)

    return {name: zero(item) for name, item in open_.items()} | {"kept": torch.ones_like(open_["kept"])}
