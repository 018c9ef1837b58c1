"""Linear memories: our kernels beside others', on the tensors that the declaration asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

import ttr
from experiments.bench import ops
from experiments.bench.case import Case, Contender
from experiments.bench.shapes import DEFAULT, EXTENDED, Shape, floor_bytes

PATH = "triton"
GATE_NORMALIZER = 16  # log_decay = logsigmoid(randn) / 16, as GLA's layer has it: the memory reaches over tens of tokens
MOMENTUM_NORMALIZER = 4  # momentum 0.82 on average; with these steps and random keys a memory grows without bound from 0.9 on
SIGNALS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "step": torch.sigmoid,
    "weight": torch.sigmoid,
    "log_decay": lambda x: logsigmoid(x) / GATE_NORMALIZER,
    "momentum": lambda x: (logsigmoid(x) / MOMENTUM_NORMALIZER).exp(),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, k, v and a write key in bf16, k and v with an axis of micro-steps after T where there are several.

    signals (log_decay is a natural log) and learned constants in float32, by the names that `regress` has for them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    write_key: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    params: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def like_output(self) -> Tensor:
        return self.v if self.v.ndim == 4 else self.v[:, :, 0]

    def leaves(self) -> list[Tensor]:
        write_key = [] if self.write_key is None else [self.write_key]
        return [self.q, self.k, self.v, *write_key, *self.signals.values(), *self.params.values()]

    def token(self) -> Inputs:
        """The first token, without its time axis."""
        signals = {name: x[:, 0] for name, x in self.signals.items()}
        return replace(self, q=self.q[:, 0], k=self.k[:, 0], v=self.v[:, 0], signals=signals)


@dataclass(frozen=True, kw_only=True)
class Linear(Case):
    """`declaration` is None where we have no kernel to compare and peers only give a yardstick.

    others: declarations of ours that run on the same inputs, by who runs them ("ttr-..."); other functions, so not compared.
    """

    shapes: tuple[Shape, ...] = DEFAULT
    more: tuple[Shape, ...] = EXTENDED
    declaration: Mapping[str, Any] | None = None
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unit_keys: bool = False  # queries and keys of length one

    def inputs(self, shape: Shape, *, requires_grad: bool, device: str = "cuda") -> Inputs:
        spec = None if self.declaration is None else ttr.spec(self.declaration)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def keys(*lead: int) -> Tensor:
            x = normal(*lead, shape.H, shape.dk)
            return (normalize(x, dim=-1) if self.unit_keys else x).bfloat16()

        token = shape.B, shape.T
        micro = token if spec is None or spec.steps == 1 else (*token, spec.steps)
        q, k, v = keys(*token), keys(*micro), normal(*micro, shape.Hv, shape.dv).bfloat16()
        signals, write_key, params = {}, None, {}
        if spec is not None:
            for name, signal in spec.signals().items():
                if signal.value is None:
                    size = *(micro if name == "step" else token), shape.Hv, *({"head": (), "key": (shape.dk,)}[signal.per])
                    signals[name] = SIGNALS[name](normal(*size))
            write_key = keys(*micro) if spec.separate_write_key else None
            # around their first values
            first = spec.init_params(shape.Hv, shape.dk, shape.dv)
            params = {name: p.detach().to(device) + normal(*p.shape) for name, p in first.items()}
        made = Inputs(q=q, k=k, v=v, write_key=write_key, signals=signals, params=params)
        for x in made.leaves():
            x.requires_grad_(requires_grad)
        return made

    def contender(self, who: str, x: Inputs) -> Contender:
        """o: [B, T, Hv, dv]. Ours gives the final state out, peers are not asked for theirs."""
        if who == "torch":
            return Contender(call=lambda: _sdpa(x), leaves=x.leaves())
        if who != "ttr" and who not in self.others:
            return ops.contender(who, self.name, x)
        declaration = self.declaration if who == "ttr" else self.others[who]
        assert declaration is not None
        return _ours(ttr.spec(declaration), x)

    def compared(self, who: str, o: Tensor, x: Inputs) -> Tensor | None:
        return None if who in self.others else o

    def floor_bytes(self, shape: Shape, kind: str) -> int:
        if self.declaration is None:
            return floor_bytes(shape, kind)
        spec = ttr.spec(self.declaration)
        per_key = sum(signal.value is None and signal.per == "key" for signal in spec.signals().values())
        return floor_bytes(shape, kind, pairs=spec.steps, write_key=spec.separate_write_key, per_key=per_key)


def _ours(spec: ttr.Spec, x: Inputs) -> Contender:
    signals: dict[str, Any] = {name: x.signals[name] for name in spec.signals() if name in x.signals}
    used = replace(x, signals=signals)
    return Contender(
        call=lambda: ttr.regress(x.q, x.k, x.v, spec, write_key=x.write_key, params=x.params, path=PATH, **signals)[0],
        leaves=used.leaves(),
    )


def _sdpa(x: Inputs) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
