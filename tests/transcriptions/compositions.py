"""Whole layers that join a memory with attention, one token at a time: Titans' MAC, MAG, MAL and LaCT's layer.

Linear maps are [d_out, d_in]. Every token's streams are worked out anew from all that came before it; nothing is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .algebra import scalar
from .fast_weights import lact
from .nonlinear import Memory

Rows = Sequence[Tensor]  # [B, d] each


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def heads(x: Tensor, n: int) -> Tensor:
    """[B, d] -> [B, n, d / n]."""
    return x.reshape(x.shape[0], n, -1)


def rotated(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """The channel pairs (i, i + d/2) of [B, H, d], turned by position · theta^(−2 i / d)."""
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half), dtype=x.dtype)
        a, b = x[..., i], x[..., half + i]
        out[..., i] = a * torch.cos(angle) - b * torch.sin(angle)
        out[..., half + i] = a * torch.sin(angle) + b * torch.cos(angle)
    return out


@dataclass
class Attention:
    """softmax(q kᵀ / √d) v with rotary positions, one query over a chosen few of the rows; W_o is left to the caller."""

    W_q: Tensor
    W_k: Tensor
    W_v: Tensor
    n_heads: int

    def __call__(self, rows: Rows, seen: Sequence[int]) -> Tensor:
        """The last row's query over rows[i], i in seen: [B, d]."""
        last = len(rows) - 1
        q = rotated(heads(rows[last] @ self.W_q.mT, self.n_heads), last)
        keys = [rotated(heads(rows[i] @ self.W_k.mT, self.n_heads), i) for i in seen]
        values = [heads(rows[i] @ self.W_v.mT, self.n_heads) for i in seen]
        scores = torch.stack([(q * k).sum(-1) for k in keys]) * q.shape[-1] ** -0.5
        weights = scores.exp() / scores.exp().sum(0)
        return sum((w[..., None] * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(q)).flatten(1)


@dataclass
class LongTermMemory:
    """Titans' LMM as a layer: q, k, v by projection, convolution and SiLU, unit q and k; M; norm, gate, W_o.

    N_t = η_t N_{t-1} − θ_t ∇ℓ(M_{t'}; k_t, v_t), M_t = (1 − α_t) M_{t-1} + N_t; ℓ the mean of squares, halved; t' the last token
    of the mini-batch before. conv: by stream, [d, 4], newest input last. rates: W_θ, W_η, W_α of [H, d], α's with a bias.
    """

    W: dict[str, Tensor]  # of q, k, v, o and gate
    conv: dict[str, Tensor]
    rates: dict[str, Tensor]
    keep_bias: Tensor
    weights: list[Tensor]
    network: Memory
    norm: Tensor
    mini_batch: int

    def __post_init__(self):
        self.n_heads = len(self.weights[0])
        self.surprise: list[Tensor] = []
        self.learned = 0

    def begin(self, batch: int) -> LongTermMemory:
        self.weights = [w.expand(batch, *w.shape) for w in self.weights]
        self.surprise = [torch.zeros_like(w) for w in self.weights]
        self.frozen = self.weights
        return self

    def stream(self, name: str, rows: Rows) -> Tensor:
        """The last row's q, k or v: [B, H, d / H]."""
        taps = [self.conv[name][:, -1 - j] * (rows[-1 - j] @ self.W[name].mT) for j in range(min(4, len(rows)))]
        x = heads(silu(torch.stack(taps).sum(0)), self.n_heads)
        return x if name == "v" else unit(x)

    def heads_of(self, rows: Rows, weights: list[Tensor]) -> Tensor:
        """M*(q) of the last row at `weights`, normalised and gated: [B, d], before W_o."""
        o = self.network.predict(weights, [None] * len(weights), self.stream("q", rows))
        return (rms(o, self.norm) * torch.sigmoid(heads(rows[-1] @ self.W["gate"].mT, self.n_heads))).flatten(1)

    def recall(self, rows: Rows, weights: list[Tensor]) -> Tensor:
        return self.heads_of(rows, weights) @ self.W["o"].mT

    def learn(self, rows: Rows) -> Tensor:
        """Learn the last row, then read it: [B, d], before W_o."""
        if self.learned % self.mini_batch == 0:
            self.frozen = self.weights
        k, v, x = self.stream("k", rows), self.stream("v", rows), rows[-1]
        theta, eta = (scalar(torch.sigmoid(x @ self.rates[name].mT)) for name in ("theta", "eta"))
        keep = scalar(torch.sigmoid(x @ self.rates["keep"].mT + self.keep_bias))
        gradients, _ = self.network.gradients(self.frozen, [None] * len(self.weights), k, v)
        self.surprise = [eta * N - theta * g / v.shape[-1] for N, g in zip(self.surprise, gradients, strict=True)]
        self.weights = [keep * w + N for w, N in zip(self.weights, self.surprise, strict=True)]
        self.learned += 1
        return self.heads_of(rows, self.weights)


@dataclass
class Gate:
    """y ⊗ m = n(y) ⊙ SiLU(n'(m))."""

    n_y: Tensor
    n_m: Tensor

    def __call__(self, y: Tensor, m: Tensor) -> Tensor:
        return rms(y, self.n_y) * silu(rms(m, self.n_m))


def in_window(last: int, window: int, prefix: int) -> list[int]:
    """What row `last` sees: the window that ends in it, and the first rows."""
    return [i for i in range(last + 1) if i > last - window or i < prefix]


def mac(x: Tensor, P: Tensor, memory: LongTermMemory, attention: Attention, W_y: Tensor, gate: Gate, W_o: Tensor, segment: int) -> Tensor:
    """Memory as a context, Behrouz et al. 2025 (2501.00663), section 4.1, made causal within a segment.

    h_t = M*_{i-1}(q_t),   y_t = Attn([P ‖ h_1 x_1 … h_t x_t]),   M_t learns y_t,   o_t = W_o (y_t ⊗ M_t*(y_t)).
    """
    memory.begin(len(x))
    xs, ys, rows, outputs = [], [], [], []
    before = memory.weights
    for t in range(x.shape[1]):
        if t % segment == 0:
            rows = [p.expand(len(x), -1) for p in P]
            before = memory.weights
        xs.append(x[:, t])
        rows += [memory.recall(xs, before), x[:, t]]
        ys.append(attention(rows, range(len(rows))) @ W_y.mT)
        m = memory.learn(ys) @ memory.W["o"].mT
        outputs.append(gate(ys[-1], m) @ W_o.mT)
    return torch.stack(outputs, 1)


def mag(x: Tensor, P: Tensor, memory: LongTermMemory, attention: Attention, gate: Gate, W_o: Tensor, window: int) -> Tensor:
    """Memory as a gate, section 4.2: y = SWA*([P ‖ x]), o = W_o (y ⊗ M([P ‖ x])); SWA* always sees P."""
    memory.begin(len(x))
    rows, outputs = [], []
    for row in [*(p.expand(len(x), -1) for p in P), *x.unbind(1)]:
        rows.append(row)
        m = memory.learn(rows)
        y = attention(rows, in_window(len(rows) - 1, window, len(P)))
        outputs.append(gate(y, m) @ W_o.mT)
    return torch.stack(outputs[len(P) :], 1)


def mal(x: Tensor, P: Tensor, memory: LongTermMemory, attention: Attention, W_o: Tensor, window: int) -> Tensor:
    """Memory as a layer, section 4.3: y = M([P ‖ x]), o = SWA(y)."""
    memory.begin(len(x))
    rows, ys, outputs = [], [], []
    for row in [*(p.expand(len(x), -1) for p in P), *x.unbind(1)]:
        rows.append(row)
        ys.append(memory.learn(rows) @ memory.W["o"].mT)
        outputs.append(attention(ys, in_window(len(ys) - 1, window, 0)) @ W_o.mT)
    return torch.stack(outputs[len(P) :], 1)


def lact_layer(
    x: Tensor, attention: Attention, W_o: Tensor, *, affine: dict[str, tuple[Tensor, Tensor]], W_rates: Tensor, rate_bias: Tensor,
    W_momentum: Tensor, W_gate: Tensor, norm: Tensor, W_0: Tensor, W_1: Tensor, W_2: Tensor, chunk: int, window: int,
) -> Tensor:  # fmt: skip
    """LaCT's layer, Zhang et al. 2025 (2505.23884): o = W_o (SWA(q, k, v) + RMS(f(q')) · SiLU(w x)), q, k, v shared.

    q', k' = rope(l2(SiLU(a ⊙ (q, k) + b))), v' = SiLU(v), per fast-weight head; affine: a and b of q and k, [H, d].
    """
    H = len(W_0)
    fast: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for t in range(x.shape[1]):
        for name, W in (("q", attention.W_q), ("k", attention.W_k)):
            a, b = affine[name]
            fast[name].append(rotated(unit(silu(a * heads(x[:, t] @ W.mT, H) + b)), t))
        fast["v"].append(silu(heads(x[:, t] @ attention.W_v.mT, H)))
    q, k, v = (torch.stack(fast[name], 1) for name in ("q", "k", "v"))
    rates = torch.nn.functional.softplus((x @ W_rates.mT).unflatten(-1, (H, 3)) + rate_bias)
    momentum = torch.sigmoid(x @ W_momentum.mT)
    f, _ = lact(q, k, v, rates=rates, momentum=momentum, W_0=W_0, W_1=W_1, W_2=W_2, chunk=chunk)
    m = rms(f, norm) * silu(x @ W_gate.mT)[..., None]
    rows, outputs = list(x.unbind(1)), []
    for t in range(len(rows)):
        y = attention(rows[: t + 1], in_window(t, window, 0))
        outputs.append((y + m[:, t].flatten(1)) @ W_o.mT)
    return torch.stack(outputs, 1)
