"""path='triton' for mini-batches of frozen gradients: whole ones through the kernels, what is open at either end through `dual`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....inner_loop import InnerLoop, concatenate
from ....inner_optim import Signals
from ....lowering import coefficients, keep_factor
from ....objectives import slopes
from ....state import State, map_tensors
from ... import padded
from ...arguments import Call, sequences
from ...padded import full_signals, initial
from ...problem import Problem
from ...torch.dual import dual
from ...torch.masks import masks, stands_still
from ..signals import signals_of
from ..two_layers.op import two_layers
from ..two_slots.path import numbers_of
from .masks_op import masks_of
from .op import mini_batches


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token. dtype: the widest of q, k and v.

    Packed sequences, and rows whose mini-batches are not open at the same token, run one by one.
    """
    B, T, _, Hv, dk, dv = call.sizes
    if torch.compiler.is_compiling() and (call.cu_seqlens is not None or call.initial_state is not None or T % int(call.spec.mini_batch)):
        raise RuntimeError(
            f"path='triton' with mini_batch={call.spec.mini_batch} is traced for whole mini-batches from a fresh state: got T={T}, "
            "an initial_state or cu_seqlens; pad T, or run this call outside torch.compile"
        )
    lengths = None if call.cu_seqlens is None else sequences(call.cu_seqlens, B, T, call.q.device)[0]
    n = B if lengths is None else len(lengths)
    state = None
    if call.initial_state is not None or T == 0 or n == 0:
        params = {name: p.float() for name, p in call.params.items()}
        state = initial(call.initial_state, call.spec, params, n, Hv, dk, dv, torch.float32, call.q.device)
        if T == 0 or n == 0:
            return call.v.new_zeros(B, T, Hv, dv), state
    if lengths is None and state is None:
        return _together(call, dtype, 0)
    positions = [0] * n if state is None else state.mini_batch["position"].tolist()
    if lengths is None and len(set(positions)) == 1:
        return _together(call._replace(initial_state=state), dtype, positions[0])
    outputs, states, begin = [], [], 0
    for i, position in enumerate(positions):
        row, length = (i, T) if lengths is None else (0, lengths[i])
        own = None if state is None else state._map(lambda x, i=i: x[i : i + 1])
        one = _tokens(call, begin, begin + length, row)._replace(initial_state=own, cu_seqlens=None)
        begin += 0 if lengths is None else length
        o, after = run(one, dtype) if length == 0 else _together(one, dtype, position)
        outputs.append(o)
        states.append(after)
    return torch.cat(outputs, 0 if lengths is None else 1), concatenate(states)


def _tokens(call: Call, begin: int, end: int, row: int | None = None) -> Call:
    """The call on the tokens [begin, end), of one row or of all."""
    B, _, *heads = call.sizes
    rows = slice(None) if row is None else slice(row, row + 1)

    def cut(x: Any) -> Any:
        return x[rows, begin:end] if isinstance(x, Tensor) and x.ndim > 2 else x

    signals = {name: cut(x) for name, x in call.signals.items()}
    sizes = B if row is None else 1, end - begin, *heads
    return call._replace(q=cut(call.q), k=cut(call.k), v=cut(call.v), signals=signals, sizes=sizes)


def _together(call: Call, dtype: torch.dtype, position: int) -> tuple[Tensor, State]:
    """All rows at once, their mini-batches open at `position`."""
    size, T = int(call.spec.mini_batch), call.sizes[1]
    begin = min(T, (size - position) % size)
    end = begin + (T - begin) // size * size
    outputs, state = [], call.initial_state
    for first, last, path in ((0, begin, None), (begin, end, _whole), (end, T, None)):
        if first == last:
            continue
        part = _tokens(call, first, last)._replace(initial_state=state)
        o, state = padded.run(part, dtype, dual, {}) if path is None else path(part, dtype)
        outputs.append(o)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def _whole(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """Whole mini-batches, from a token where one begins."""
    spec, regressor, (B, _, _, Hv, dk, dv) = call.spec, call.spec.regressor, call.sizes
    params = {name: p.float() for name, p in call.params.items()}
    state = call.initial_state
    if state is None:
        state = initial(None, spec, params, B, Hv, dk, dv, torch.float32, call.q.device)
    q, k, v = ((x if x.dtype == dtype else x.to(dtype)).contiguous() for x in (call.q, call.k, call.v))
    q = q if call.scale == 1.0 else q * call.scale

    affine = [params[name].contiguous() for name in regressor.outer if name in params] or [None, None]
    first = {
        name: torch.stack([state.weights[name], *(state.slots[slot][name] for slot in spec.optimizer.slots)], 2)
        for name in spec.weight_names
    }
    layers, (curvature, gain) = regressor.layers(), slopes(spec.objective, dv)
    assert layers is not None  # `eligible` has asked
    form = layers.residual, layers.eps, curvature, gain, spec.read.at == "before"
    run = _one_layer if layers.activation is None else partial(_two_layers, layers.activation)
    with torch.autocast(q.device.type, enabled=False):
        numbers = _numbers(call, params) if stands_still(spec) else (*_masks(call, state, params), None)
        o, last = run((q, k, v, *numbers, *affine), first, int(spec.mini_batch), form)
    after = {name: x.unbind(2) for name, x in last.items()}
    memory = {
        "weights": {name: x[0] for name, x in after.items()},
        "slots": {slot: {name: x[i + 1] for name, x in after.items()} for i, slot in enumerate(spec.optimizer.slots)},
    }
    mini_batch = {"start": map_tensors(Tensor.clone, memory), "position": torch.zeros_like(state.mini_batch["position"])}
    return o if o.dtype == call.v.dtype else o.to(call.v.dtype), State(**memory, mini_batch=mini_batch, spec_hash=spec.hash)


def _one_layer(inputs: tuple, first: dict[str, Tensor], size: int, form: tuple) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights and slots by name, [N, Hv, r, ...], before and behind the mini-batches."""
    weight, *bias = first
    o, last, last_bias = mini_batches(*inputs, first[weight], first[bias[0]] if bias else None, size, *form)
    return o, {weight: last} | ({bias[0]: last_bias} if bias and last_bias is not None else {})


def _two_layers(activation: str, inputs: tuple, first: dict[str, Tensor], size: int, form: tuple) -> tuple[Tensor, dict[str, Tensor]]:
    """The same; the kernels take a memory as one row, the weights before the biases."""
    names = sorted(first, key=lambda name: first[name].ndim, reverse=True)
    widths = [first[name][0, 0, 0].numel() for name in names]
    memory = torch.cat([first[name].flatten(3) for name in names], 3)
    o, last = two_layers(*inputs, memory, size, first[names[0]].shape[-1], len(names) > 2, activation, *form)
    return o, {name: x.view(first[name].shape) for name, x in zip(names, last.split(widths, 3), strict=True)}


def _numbers(call: Call, params: dict[str, Tensor]) -> tuple[None, None, Tensor, None, Tensor | None]:
    """Where nothing but gradients moves the weights: what a token's gradient is multiplied by, [B, T, Hv], and the positions' factor."""
    spec, device, (B, T, _, Hv, _, _) = call.spec, call.v.device, call.sizes
    one = torch.ones((), device=device)
    (written,) = spec.optimizer.update((torch.zeros_like(one),), one, Signals(signals_of(call)))
    factor = None
    if spec.optimizer.position != "none":
        factor = InnerLoop(spec, params).factors(0, int(spec.mini_batch), one).expand(Hv, -1).contiguous()
    return None, None, written.expand(B, T, Hv).contiguous(), None, factor


def _masks(call: Call, state: State, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """R, Q0, F and phi of every mini-batch: [B, mini-batches, Hv, ...]. One slot beside the weights has kernels that make them of
    mini-batches of 2^n tokens; else torch does.
    """
    spec, size, (B, T, _, Hv, _, _) = call.spec, int(call.spec.mini_batch), call.sizes
    if spec.optimizer.slots and not size & (size - 1):
        return masks_of(numbers_of(call, -1.0, signals_of(call)), size, spec.read.at == "before")
    values, decay = full_signals(call, torch.float32)

    def lay(x: Tensor) -> Tensor:  # [B, T, Hv, ...] -> [B T / b, Hv, b, ...]
        return x.unflatten(1, (T // size, size)).flatten(0, 1).movedim(2, 1).float()

    signals = {name: lay(x)[..., None, None, None] for name, x in values.items()}
    log_decay = None if decay is None else lay(decay)
    lead = B * (T // size), Hv, size, 1
    empty = call.v.new_empty(0)
    problem = Problem(spec, empty, empty, empty, None, signals, log_decay, params, state, None)
    probed = coefficients(spec, signals, keep_factor(problem), lead, look_first=False)
    m = masks(spec, probed)
    return tuple(m[name].unflatten(0, (B, T // size)).contiguous() for name in ("R", "Q0", "F", "phi"))
