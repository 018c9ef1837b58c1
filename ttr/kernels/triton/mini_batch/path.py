"""path='triton' for mini-batches of frozen gradients: through the kernels, but for tokens that go on with an open mini-batch.

Those run through `dual`: their gradients are taken at the weights that the mini-batch began with, not at those they go on from.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ....inner_loop import InnerLoop, initial_slots, initial_weights
from ....inner_optim import Signals
from ....lowering import Coefficients
from ....objectives import slopes
from ....regressors.base import Layers
from ....state import State, Tree
from ... import padded
from ...arguments import Call, packed_lengths
from ...padded import initial
from ...torch.dual import dual
from ...torch.masks import masks, stands_still
from ..eligible import why_not_plain
from ..signals import number_of, per_head, signals_of
from ..two_layers.op import two_layers
from ..two_slots.path import numbers_of
from .op import mini_batches
from .rows import Even, Uneven

Memory = dict[str, Tensor]  # weights and slots by name, [N, Hv, r, ...]


def run(call: Call, dtype: torch.dtype) -> tuple[Tensor, State]:
    """o: [B, T, Hv, dv], and the state after the last token. dtype: the widest of q, k and v.

    Whole mini-batches of all rows are one call of the kernels, the open ones behind them another, padded by tokens that are no
    events. Packed sequences, and rows whose states are open at different tokens, are padded to the longest likewise (`Uneven`).
    """
    spec, size, (B, T, _, Hv, dk, dv), device = call.spec, int(call.spec.mini_batch), call.sizes, call.q.device
    given = call.initial_state
    if torch.compiler.is_compiling() and (call.cu_seqlens is not None or isinstance(given, State)):
        raise RuntimeError(
            f"path='triton' with mini_batch={size} asks the host where mini-batches begin, which torch.compile cannot trace: got "
            f"{'an initial_state' if call.cu_seqlens is None else 'cu_seqlens'}; pass whole sequences from a fresh state, [B, T] of any "
            "T, or run this call outside torch.compile"
        )
    lengths = None if call.cu_seqlens is None else packed_lengths(call.cu_seqlens, B, T)
    n = B if lengths is None else len(lengths)
    params = {name: p.float() for name, p in call.params.items()}
    if T == 0 or n == 0:
        return call.v.new_zeros(B, T, Hv, dv), initial(given, spec, params, n, Hv, dk, dv, torch.float32, device)
    if given is None:  # nothing but weights and slots is read of a fresh state, and to make the rest takes launches
        alike = n if _layers(spec).activation is None else 1  # the kernels of two layers take one memory for all sequences
        weights = initial_weights(spec, params, alike, Hv, dk, dv, torch.float32, device)
        state = State(weights=weights, slots=initial_slots(spec, weights))
    else:
        state = initial(given, spec, params, n, Hv, dk, dv, torch.float32, device)
    positions = state.mini_batch["position"].tolist() if isinstance(given, State) else None
    if lengths is None and len(set(positions or [0])) == 1:
        rows = Even(positions[0] if positions else 0, T, size, device)
    else:
        rows = Uneven(positions or [0] * n, lengths or [T] * n, size, device)
    tokens, outputs = [rows.lay(x) for x in (call.q, call.k, call.v)], []
    if rows.head:
        q, k, v = (x[0] for x in tokens)
        signals = {name: rows.lay(x)[0] if isinstance(x, Tensor) and x.ndim > 2 else x for name, x in call.signals.items()}
        head = call._replace(q=q, k=k, v=v, signals=signals, sizes=(*q.shape[:2], *call.sizes[2:]))
        o, state = padded.run(head._replace(initial_state=state, cu_seqlens=rows.bounds), dtype, dual, {})
        outputs.append(o)
    if not rows.whole and not rows.tail:
        return rows.join(outputs, call.v), state
    memory = start = _stacked(state.weights, state.slots)
    with torch.autocast(device.type, enabled=False):
        laid, factor = rows.lay(_numbers(call)), _factor(call, params)
        still = None if stands_still(spec) or all(events is None for events in rows.events) else _numbers_of_none(spec, device)
        for part, width in (1, rows.whole), (2, rows.tail):
            if not width:
                continue
            start, numbers, events = memory, laid[part], rows.events[part - 1]
            if events is not None and still is not None:
                numbers = torch.where(events[..., None, None], numbers, still[:, None])
            if factor is not None and part == 2:  # it does not close: what it leaves is not scaled
                factor = torch.cat([factor[:, :-1], torch.ones_like(factor[:, :1])], 1)
            o, memory = _kernels(call, params, dtype, [x[part] for x in tokens], numbers, factor, memory)
            outputs.append(o)
    if not rows.tail or not rows.whole:  # `decode` updates the weights in place: each state has its own
        start = {name: x.expand(n, *x.shape[1:]).clone() for name, x in (start if rows.tail else memory).items()}
    if rows.unfinished is not None:
        kept = _stacked(**state.mini_batch["start"])
        start = {name: torch.where(rows.unfinished.view(-1, *[1] * (x.ndim - 1)), kept[name], x) for name, x in start.items()}
    mini_batch = {"start": _tree(spec, start), "position": rows.positions(n)}
    return rows.join(outputs, call.v), State(**_tree(spec, memory), mini_batch=mini_batch, spec_hash=spec.hash)


def _stacked(weights: Tree, slots: Tree) -> Memory:
    return {name: torch.stack([w, *(slot[name] for slot in slots.values())], 2) for name, w in weights.items()}


def _tree(spec, memory: Memory) -> Tree:
    """The inverse of `_stacked`."""
    each = {name: x.unbind(2) for name, x in memory.items()}
    weights, *slots = ({name: x[i] for name, x in each.items()} for i in range(1 + len(spec.optimizer.slots)))
    return {"weights": weights, "slots": dict(zip(spec.optimizer.slots, slots, strict=True))}


def _kernels(call: Call, params: Memory, dtype: torch.dtype, tokens: list[Tensor], numbers: Tensor, factor: Tensor | None, first: Memory):
    """Whole mini-batches: their outputs, and the memory behind them. numbers: as of `_numbers`, of these tokens."""
    spec, regressor, size = call.spec, call.spec.regressor, int(call.spec.mini_batch)
    q, k, v = ((x if x.dtype == dtype else x.to(dtype)).contiguous() for x in tokens)
    q = q if call.scale == 1.0 else q * call.scale
    affine = [params[name].contiguous() for name in regressor.outer if name in params] or [None, None]
    layers, (curvature, gain) = _layers(spec), slopes(spec.objective, v.shape[-1])
    if takes_its_step(spec):  # of the negative gradient, then, which nobody has to launch a kernel for
        curvature, gain = -curvature, -gain
    form = layers.residual, layers.eps, curvature, gain, spec.read.at == "before"
    mixed = (None, None, numbers.contiguous(), None) if stands_still(spec) else _masks(spec, numbers.movedim(2, 0), size)
    layer = _one_layer if layers.activation is None else partial(_two_layers, layers.activation)
    o, last = layer((q, k, v, *mixed, factor, *affine), first, size, form)
    return o if o.dtype == call.v.dtype else o.to(call.v.dtype), last


def _layers(spec) -> Layers:
    layers = spec.regressor.layers()
    assert layers is not None  # `eligible` has asked
    return layers


def _one_layer(inputs: tuple, first: Memory, size: int, form: tuple) -> tuple[Tensor, Memory]:
    weight, *bias = first
    o, last, last_bias = mini_batches(*inputs, first[weight], first[bias[0]] if bias else None, size, *form)
    return o, {weight: last} | ({bias[0]: last_bias} if bias and last_bias is not None else {})


def _two_layers(activation: str, inputs: tuple, first: Memory, size: int, form: tuple) -> tuple[Tensor, Memory]:
    """The kernels take a memory as one row, the weights before the biases."""
    names = sorted(first, key=lambda name: first[name].ndim, reverse=True)
    widths = [first[name][0, 0, 0].numel() for name in names]
    memory = torch.cat([first[name].flatten(3) for name in names], 3)
    o, last = two_layers(*inputs, memory, size, first[names[0]].shape[-1], len(names) > 2, activation, *form)
    return o, {name: x.unflatten(3, first[name].shape[3:]) for name, x in zip(names, last.split(widths, 3), strict=True)}


def takes_its_step(spec) -> bool:
    """Whether all that an update does is to take its step of the gradient."""
    return stands_still(spec) and why_not_plain(spec) is None


def _numbers(call: Call) -> Tensor:
    """What the optimizer and the gate make of every token.

    Where nothing but gradients moves the weights, one number, [B, T, Hv]: what the gradient is multiplied by, or its negative
    (`takes_its_step`). Else those of `numbers_of`, [B, T, numbers, Hv].
    """
    spec, (B, T, _, Hv, _, _) = call.spec, call.sizes
    if takes_its_step(spec):
        return per_head(call.signals["step"], call).float().expand(B, T, Hv)
    if stands_still(spec):
        nothing, one = (number_of(x, Hv, call.v.device) for x in (0.0, 1.0))
        (written,) = spec.optimizer.update((nothing,), one, Signals(signals_of(call)))
        return written.expand(B, T, Hv)
    return numbers_of(call, -1.0, signals_of(call)).movedim(0, 2)


def _numbers_of_none(spec, device: torch.device) -> Tensor:
    """[numbers], those of `numbers_of` where there is no token: the slots stay what they are, and nobody looks or reads."""
    eye = torch.eye(1 + len(spec.optimizer.slots), device=device)
    return torch.cat([torch.nn.functional.pad(eye, (0, 1)).flatten(), eye.new_zeros(2 * len(eye))])


def _factor(call: Call, params: Memory) -> Tensor | None:
    """By the position in a mini-batch, [Hv, tokens]."""
    if call.spec.optimizer.position == "none":
        return None
    some = torch.ones((), device=call.v.device)
    return InnerLoop(call.spec, params).factors(0, int(call.spec.mini_batch), some).expand(call.sizes[3], -1).contiguous()


def _masks(spec, numbers: Tensor, size: int) -> tuple[Tensor | None, ...]:
    """R, Q0, F and phi of every mini-batch: [N, mini-batches, Hv, ...]. With one slot beside the weights and mini-batches of 2^n
    tokens the numbers stand in F's place: the operators have kernels that make all four of them.
    """
    r = 1 + len(spec.optimizer.slots)
    if r == 2 and not size & (size - 1):
        return None, None, numbers.contiguous(), None
    each = numbers.unflatten(2, (-1, size)).transpose(3, 4)  # [numbers, N, mini-batches, Hv, tokens]
    lead = each.shape[1:3]
    each = each.flatten(1, 2)[..., None, None, None]
    rows, (looks, reads) = each[: r * (r + 1)].unflatten(0, (r, r + 1)), each[r * (r + 1) :].unflatten(0, (2, r))
    made = masks(spec, Coefficients(A=rows[:, :-1], b=rows[:, -1], c=looks, read=reads[..., 0, :, :]))
    return tuple(made[name].unflatten(0, lead).contiguous() for name in ("R", "Q0", "F", "phi"))
