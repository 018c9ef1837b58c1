"""Mixer: a declared test-time regression layer as an nn.Module, [B, T, d_model] -> [B, T, d_model]."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..choice import PathChoice, check_options, kind_of, options_of, select_path
from ..gates import constant_decay
from ..kernels.api import regress
from ..kernels.arguments import facts_of
from ..kernels.paths import fresh_state
from ..kernels.recall import recall
from ..signals import Signal
from ..spec import Spec
from ..spec import spec as read_spec
from ..stages import Call, OutputGate, Packed, StageModule, StreamSize, Timeline
from ..stages.conv import ShiftModule
from ..state import State
from .causal import CausalLayer
from .signals import SignalProjection, SignalSize
from .sizes import head_sizes
from .state import MixerState
from .streams import Stream, build, build_projection, build_streams, run

OUTPUT_SHIFT_POWER = 0.2  # RWKV-7's token shift for its output gate


@dataclass(frozen=True)
class Inputs:
    """The arguments of `regress` that a layer makes of its input."""

    q: Tensor
    k: Tensor
    v: Tensor
    write_key: Tensor | None
    signals: dict[str, Tensor]
    params: dict[str, Tensor]


class Mixer(CausalLayer[MixerState]):
    """A sequence mixer declared by `spec`: tensor in, tensor out, causal.

    d_model: width of the input and the output. spec: preset name, YAML path, mapping or Spec. layer_idx, n_layers: the
    layer's place, on which some initialisations and decays depend. path: as in `ttr.regress`. layer_overrides: fields
    of the declaration's `layer` (n_heads, head_dim, expand_v, q, output, ...). given: those of q, k, v and o whose
    projections belong to a composition around this mixer, which then runs `heads`.

    Raises SpecError or ValueError when the declaration or the sizes have no meaning.
    """

    state_class = MixerState

    def __init__(
        self,
        d_model: int,
        spec: str | Path | Mapping | Spec,
        *,
        layer_idx: int = 0,
        n_layers: int = 1,
        path: PathChoice = "auto",
        given: Sequence[str] = (),
        **layer_overrides: Any,
    ):
        super().__init__()
        if not isinstance(d_model, Integral):
            raise ValueError(f"d_model={d_model!r}: expected a whole number of channels, before the declaration: Mixer(d_model, spec)")
        self.spec = read_spec(spec, **{f"layer.{name}": value for name, value in layer_overrides.items()})
        self.d_model, self.layer_idx, self.n_layers, self.path = d_model, layer_idx, n_layers, path
        if not 0 <= layer_idx < n_layers:
            raise ValueError(f"layer_idx={layer_idx}: expected 0 <= layer_idx < n_layers={n_layers}")
        self.sizes = sizes = head_sizes(self.spec, d_model, exactly="head_dim" in layer_overrides)
        self.pairs = self.spec.steps if getattr(self.spec.optimizer, "pairs", "shared") == "separate" else 1
        place = StreamSize(
            d_model=d_model, layer_idx=layer_idx, n_layers=n_layers, mini_batch=self.spec.mini_batch,
            micro_steps=self.pairs, heads=sizes.heads,
        )  # fmt: skip

        streams = build_streams(self.spec, sizes, self.pairs, place)
        self.streams = nn.ModuleDict(streams)
        self.dk, self.dv = streams["q"].width, streams["v"].width
        kind, _ = select_path(self.spec, path=kind_of(path), dk=self.dk, dv=self.dv)
        if kind_of(path) != "auto":  # of which the call's device decides
            check_options(self.spec, kind, options_of(path))
        for name in ("q", "k", "v", "write_key"):
            projection = build_projection(name, streams, d_model) if name in streams and name not in given else None
            if projection is not None:
                self.add_module(f"{name}_proj", projection)
        output = StreamSize(**{**vars(place), "name": "output", "width": self.dv, "keys": (sizes.key_heads, self.dk)})
        self.output_stages, width = build(self.spec.layer.output or (), output)
        self.width = sizes.heads * width
        if "o" not in given:
            self.o_proj = nn.Linear(self.width, d_model, bias=False)

        self.signals = self._signal_projection()
        shapes = self.spec.param_shapes(sizes.heads, self.dk, self.dv)
        self.params = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        # sequences up to here are read with the initial weights alone
        self.unread = int(self.spec.mini_batch) if getattr(self.spec.optimizer, "accumulate", False) else 0
        self.uses_shift = any(isinstance(m, ShiftModule) for m in self.modules())
        self.uses_position = any(stage.position for stage in self._stage_modules())
        self._reset_params()

    def _signal_projection(self) -> SignalProjection:
        """Of the declaration's signals and of the output gates, which are called output_0, ... by their place."""
        heads, steps, tensors = self.sizes.heads, self.spec.steps, len(self.spec.weight_names)
        signals: dict[str, Signal] = dict(self.spec.signals())
        sizes = {
            name: SignalSize(heads, s.width(self.dk, self.dv, tensors, self.spec.window), steps if name == "step" and steps > 1 else None)
            for name, s in signals.items()
        }
        for i, stage in enumerate(self.spec.layer.output or ()):
            if isinstance(stage, OutputGate):
                signals[f"output_{i}"] = gate = stage.gate_signal  # type: ignore[attr-defined]
                width = gate.width(self.dk, self.dv, tensors)
                sizes[f"output_{i}"] = SignalSize(heads, width, shift_power=OUTPUT_SHIFT_POWER, wide=False)
        total = {name: stream.total for name, stream in self._by_name().items()}
        sources = {"x": self.d_model, "shift": self.d_model, "v": total["v"], "qkv": total["q"] + total["k"] + total["v"]}
        return SignalProjection(
            signals, sizes, sources,
            head_dim=self.sizes.key_width, layer_idx=self.layer_idx, n_layers=self.n_layers,
            late=signals.keys() - self.spec.signals().keys(),
        )  # fmt: skip

    def _by_name(self) -> dict[str, Stream]:
        return dict(self.streams.items())  # type: ignore[arg-type]

    def projected_width(self, name: str) -> int:
        """Channels of a stream as its projection makes them, all heads together."""
        stream = self._by_name()[name]
        return stream.heads * stream.projected_width

    def _stage_modules(self) -> list[StageModule]:
        stages = [m for stream in self._by_name().values() for m in stream.stage_modules()]
        return [*stages, *self.output_stages]  # type: ignore[list-item]

    @torch.no_grad()
    def _reset_params(self) -> None:
        for name, value in self.spec.init_params(self.sizes.heads, self.dk, self.dv).items():
            self.params[name].copy_(value)

    def reset_parameters(self) -> None:
        """Initialise everything as published (linear maps as nn.Linear does); also after `to_empty`."""
        for module in (*self.children(), *self._stage_modules()):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        self._reset_params()

    def forward(self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        self.warn_unread(x)
        return super().forward(x, mask, cu_seqlens)

    def warn_unread(self, x: Tensor) -> None:
        """Warn when the training sequences x: [B, T, d_model] end before the memory is written."""
        if self.unread and self.training and not torch.compiler.is_compiling() and x.ndim == 3 and 0 < x.shape[1] <= self.unread:
            warnings.warn(
                f"{self.spec.name or 'Mixer'}: {x.shape[1]} tokens in training, but the memory is first written after "
                f"mini_batch={self.unread} and read only then: it learns nothing here; set optimizer.mini_batch",
                stacklevel=3,
            )

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """The state before the first token. dtype: of the layer's activations (the memory is float32, or float64)."""
        weight = next(self.parameters(), torch.empty(0))
        device = weight.device if device is None else torch.device(device)
        dtype = weight.dtype if dtype is None else dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        params = {name: p.to(device=device, dtype=wide) for name, p in self.params.items()}
        memory = fresh_state(self.spec, params, batch_size, self.sizes.heads, self.dk, self.dv, wide, device)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        conv = {m.key: zeros(m.history, m.channels) for m in self._stage_modules() if m.history}
        shift = {"x": zeros(1, self.d_model)} if self.uses_shift else {}
        position = {"tokens": zeros(dtype=torch.long)} if self.uses_position else {}
        return MixerState(memory, conv, shift, position)

    def inputs(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Inputs:
        """What `regress` is given when the layer reads x: [B, T, d_model] from the start."""
        self._check_input(x, None, cu_seqlens)
        return self._inputs(self._begin(x, None, cu_seqlens)[0])

    def _check_state(self, state: Any, n: int) -> None:
        super()._check_state(state, n)
        if state.memory.spec_hash != self.spec.hash:
            raise ValueError(f"state was made under another declaration (hash {state.memory.spec_hash!r}, this one {self.spec.hash!r})")

    def run(self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MixerState]:
        o, state = self.heads(x, state, cu_seqlens)
        return self.o_proj(o), state

    def heads(
        self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None, projected: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, MixerState]:
        """The layer up to its output projection: [B, T, width], all heads side by side, and the next state.

        projected: the streams that are `given`, [B, T, d_out] as their projections make them.
        """
        call, position = self._begin(x, state, cu_seqlens)
        given = self._inputs(call, projected)
        o, memory = regress(
            given.q, given.k, given.v, self.spec, write_key=given.write_key, params=given.params,
            initial_state=None if state is None else state.memory, cu_seqlens=cu_seqlens, path=self.path,
            **given.signals,  # type: ignore[arg-type]
        )  # fmt: skip
        return self._read_out(o, call), self._after(memory, call, position)

    def recall(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """M*(q): what the memory in `state` says to x: [B, T, d_model] without learning it; only the streams go on."""
        call, position = self._begin(x, state, None)
        o = recall(self._inputs(call).q, self.spec, state.memory, dict(self.params.items()))
        return self.o_proj(self._read_out(o, call)), self._after(state.memory, call, position)

    def _read_out(self, o: Tensor, call: Call) -> Tensor:
        return run(self.output_stages, o, call).flatten(2)

    def _after(self, memory: State, call: Call, position: dict[str, Tensor]) -> MixerState:
        shift = {"x": call.kept.pop("x")} if self.uses_shift else {}
        return MixerState(memory, call.kept, shift, position)

    def _begin(self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> tuple[Call, dict[str, Tensor]]:
        """The call, and how many tokens will have been read after it."""
        timeline = Timeline(x.shape[0]) if cu_seqlens is None else Packed(cu_seqlens)
        call = Call(x=x, timeline=timeline, history={} if state is None else {**state.conv, **state.shift})
        if self.uses_shift:
            call.previous = call.before("x", x)
        if not self.uses_position:
            return call, {}
        zero = torch.zeros(timeline.n_sequences, dtype=torch.long, device=x.device)
        call.position, after = timeline.position(x, zero if state is None else state.position["tokens"])
        return call, {"tokens": after}

    def _inputs(self, call: Call, given: Mapping[str, Tensor] | None = None) -> Inputs:
        """Fill the call's streams and signals, and give the regressor's arguments. given: as `heads` takes them."""
        streams = self._by_name()
        projected = {name: y.unflatten(-1, (streams[name].heads, -1)) for name, y in (given or {}).items()}

        def project(name: str) -> Tensor:  # which must not call itself: a cycle would keep the call and its streams alive
            name = streams[name].proj.share or name
            if name not in projected:
                stream = streams[name]
                y = getattr(self, f"{name}_proj")(stream.input(call))
                projected[name] = y.unflatten(-1, (stream.heads, stream.projected_width))
            return projected[name]

        for name in ("v", "k", "q"):
            call.streams[name] = streams[name](project(name), call)
        call.signals = self.signals(call)
        if "write_key" in streams:
            call.streams["write_key"] = streams["write_key"](project("write_key"), call)
        pairs = {name: x if self.pairs == 1 or name == "q" else x.unflatten(2, (self.pairs, -1)) for name, x in call.streams.items()}

        params, declared, gate = dict(self.params.items()), self.spec.signals(), self.spec.gate
        signals = {name: call.signals[name] for name in declared if name in call.signals}
        if gate.decays and "log_decay" not in declared:  # it may depend on the layer's place
            heads, device = self.sizes.heads, call.x.device
            if facts_of(self.spec).constant_decay:
                dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
                decay = constant_decay(gate, heads, device, dtype, self.layer_idx, self.n_layers)
            else:
                decay = gate.log_decay(signals, n_heads=heads, layer_idx=self.layer_idx, n_layers=self.n_layers, params=params)
            if decay is not None:
                signals["log_decay"] = decay.to(device)
        return Inputs(pairs["q"], pairs["k"], pairs["v"], pairs.get("write_key"), signals, params)

    def extra_repr(self) -> str:
        weight = next(self.parameters(), torch.empty(0))
        device = weight.device.type if kind_of(self.path) == "auto" else None  # an explicit path is judged where it runs
        path, reason = select_path(self.spec, path=kind_of(self.path), device=device, dk=self.dk, dv=self.dv)
        s = self.sizes
        heads = f"{s.heads} heads" + ("" if s.key_heads == s.heads else f" on {s.key_heads} key heads")
        name = self.spec.name or "unnamed"
        return f"{name}: d_model={self.d_model}, {heads}, keys {self.dk}, values {self.dv}\npath={path} ({reason})"
