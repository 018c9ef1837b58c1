"""What the memories of a model do on an input: inner losses before and after each token, steps, decays, norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..inner_optim import Signals
from ..kernels.api import regress
from ..kernels.paths import fresh_state
from ..objectives import slopes
from ..spec import Read, Spec
from ..stages import Packed, pack, unpack
from .compose import ComposedLayer
from .mixer import Inputs, Mixer


@dataclass(frozen=True)
class Diagnosis:
    """One mixer on one input; B, T as the input has them (N sequences where it is packed).

    loss_before, loss_after: [B, T, Hv], the declared objective on the token's pair (the mean of its `steps` pairs), at
    the weights before and after the token was learned; after its whole mini-batch with `accumulate`, NaN where that
    lies outside the input. None for a regressor without an inner loss. step: as `regress` takes it, or None. decay:
    what is kept, [Hv], [B, T, Hv] or [B, T, Hv, dk], or None. state_norm: [N, Hv], of all weights at the end.
    """

    loss_before: Tensor | None
    loss_after: Tensor | None
    step: Tensor | None
    decay: Tensor | None
    state_norm: Tensor


@torch.no_grad()
def diagnose(module: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, Diagnosis]:
    """Run `module(*inputs, **keywords)` and look into every Mixer in it: {module name: Diagnosis}.

    The same weights, no gradients, and the module is left as it was. Compositions are left out: their memories read what
    other parts make. Raises ValueError where there is no other Mixer, TypeError for what is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module with a ttr.Mixer in it, got {type(module).__name__}")
    parts = {id(part) for m in module.modules() if isinstance(m, ComposedLayer) for part in m.children()}
    mixers = {name or "mixer": m for name, m in module.named_modules() if isinstance(m, Mixer) and id(m) not in parts}
    if not mixers:
        but = "but parts of compositions, whose memories read what other parts make" if parts else "at all"
        raise ValueError(f"module: {type(module).__name__} contains no ttr.Mixer {but}")
    reports: dict[str, Diagnosis] = {}

    def watch(name: str) -> Callable:
        def hook(mixer, args, kwargs):
            names = ("x", "mask", "cu_seqlens")
            reports[name] = _diagnose(mixer, **dict(zip(names, args, strict=False)), **kwargs)

        return hook

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in mixers.items()]
    try:
        module(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return reports


def _diagnose(mixer: Mixer, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Diagnosis:
    if mask is not None:
        x, cu_seqlens = pack(x, mask)
    given = mixer.inputs(x, cu_seqlens)
    probe = _Probe(mixer, given, cu_seqlens)
    before, after = (None, None) if mixer.spec.objective is None else probe.losses()
    weights = probe.state.weights.values()
    norm = sum(w.flatten(2).square().sum(-1) for w in weights if w.ndim > 2)
    step, decay = given.signals.get("step"), given.signals.get("log_decay")
    decay = None if decay is None else decay.exp()
    if mask is not None:
        before, after, step = (None if t is None else unpack(t, mask) for t in (before, after, step))
        decay = decay if decay is None or decay.ndim == 1 else unpack(decay, mask)
    return Diagnosis(before, after, step, decay, torch.as_tensor(norm).sqrt())


class _Probe:
    """Reads the memory with keys as queries: what it predicts for a pair at any distance from learning it."""

    def __init__(self, mixer: Mixer, given: Inputs, cu_seqlens: Tensor | None):
        self.mixer, self.given, self.cu_seqlens = mixer, given, cu_seqlens
        self.spec: Spec = mixer.spec
        self.accumulate = bool(getattr(self.spec.optimizer, "accumulate", False))
        if self.spec.regressor.kind != "kernel":
            read = Read(at="before" if self.accumulate else "after", scale=1.0)
            self.spec = replace(self.spec, read=read)
        self.state = self._regress(given.q)[1]

    def _regress(self, q: Tensor):
        g = self.given
        return regress(
            q, g.k, g.v, self.spec, write_key=g.write_key, params=g.params, cu_seqlens=self.cu_seqlens,
            **g.signals,  # type: ignore[arg-type]
        )  # fmt: skip

    def losses(self) -> tuple[Tensor, Tensor]:
        """The objective on each token's pairs before and after they were learned: [B, T, Hv] each."""
        if self.accumulate:
            length = self.mixer.spec.mini_batch
            return self._loss(0), self._loss(length if isinstance(length, int) else self.given.q.shape[1])
        return self._loss(-1), self._loss(0)

    def _loss(self, offset: int) -> Tensor:
        """The mean loss of a token's pairs, predicted by what the memory is `offset` tokens later."""
        pairs = [None] if self.mixer.pairs == 1 else range(self.mixer.pairs)
        total = torch.zeros(())
        for j in pairs:
            k, v = (x if j is None else x[:, :, j] for x in (self.given.k, self.given.v))
            prediction, w = self._predict(k, offset), self.given.write_key
            if w is None:
                total = total + self._objective(prediction, v)
            else:
                written = self._predict(w if j is None else w[:, :, j], offset)
                total = total + self._split(prediction, written, v)
        return total / len(pairs)

    def _predict(self, k: Tensor, offset: int) -> Tensor:
        """f(k_t) at the weights that token t + offset reads: [B, T, Hv, dv]; NaN where there is no such token."""
        T = k.shape[1]
        index = torch.arange(T, device=k.device)
        if self.cu_seqlens is not None:
            packed = Packed(self.cu_seqlens)
            index, length = packed.index, self.cu_seqlens.diff()[packed.sequence]
        else:
            length = T
        out = self._regress(k.roll(offset, 1))[0].roll(-offset, 1)
        inside = (index + offset >= 0) & (index + offset < length)
        out = torch.where(inside[:, None, None], out, torch.nan)
        if offset < 0:
            out[:, index + offset < 0] = self._predict_first(k[:, index + offset < 0])
        return out

    def _predict_first(self, k: Tensor) -> Tensor:
        """f(k) before anything was read."""
        m = self.mixer
        heads = m.sizes.heads
        if m.spec.regressor.family != "trained":
            return k.new_zeros(*k.shape[:2], heads, m.dv)
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        params = {name: p.to(dtype) for name, p in self.given.params.items()}
        w = fresh_state(self.spec, params, 1, heads, m.dk, m.dv, dtype, k.device).weights
        mirrored = torch.func.vmap(m.spec.optimizer.mirror)  # over the heads
        w = {name: mirrored(t[0]) for name, t in w.items()} | {n: params[n] for n in m.spec.regressor.outer if n in params}
        k = k.to(dtype).repeat_interleave(heads // k.shape[2], 2)
        return torch.func.vmap(m.spec.regressor.predict, in_dims=(0, 2), out_dims=2)(w, k).to(k.dtype)

    def _objective(self, prediction: Tensor, target: Tensor) -> Tensor:
        objective = self.spec.objective
        values = {
            name: self.given.signals.get(name, torch.tensor(s.value or 0.0)).expand(prediction.shape[:-1])
            for name, s in objective.signals().items()
            if s.per != "window"  # which weighs losses, and is in none
        }

        def loss(p: Tensor, v: Tensor, s: dict[str, Tensor]) -> Tensor:
            return objective.loss(p, v, Signals(s))

        for _ in range(prediction.ndim - 1):
            loss = torch.func.vmap(loss)
        return loss(prediction, target.to(prediction.dtype), values)

    def _split(self, erased: Tensor, written: Tensor, target: Tensor) -> Tensor:
        """1/2 c ||f(k)||^2 - g <f(k_w), v>: the objective with a separate write key."""
        curvature, gain = slopes(self.spec.objective, target.shape[-1])
        return 0.5 * curvature * erased.square().sum(-1) - gain * (written * target).sum(-1)
