"""Test-time-trained networks: weights of their own for every token, gradients worked out by hand.

A memory is an MLP with GELU between its layers, then where wanted LayerNorm and a skip: M(x) = x + LN(MLP(x)).
For one head, z = x W + b with x a row. Weights are given as [H, d_in, d_out], biases as [H, d_out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .algebra import outer, scalar


@dataclass(frozen=True)
class Memory:
    """What is fixed while the weights are trained: the norm's affine map (None: no norm), the skip, the GELU's form."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: bool
    gelu: str
    eps: float = 1e-6

    def predict(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], x: Tensor) -> Tensor:
        """M(x): [B, H, d] -> [B, H, d]."""
        z = self._layers(weights, biases, x)[1][-1]
        if self.norm_weight is not None and self.norm_bias is not None:
            z = self.norm_weight * self._standardised(z)[0] + self.norm_bias
        return x + z if self.residual else z

    def gradients(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], k: Tensor, v: Tensor,
        slope: Callable[[Tensor], Tensor] = lambda e: e,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """The gradients with respect to every weight and every bias of the loss whose derivative in e = M(k) − v is `slope`.

        As it is given, that is ½‖e‖², summed over channels.
        """
        inputs, pre = self._layers(weights, biases, k)
        target = v - k if self.residual else v
        if self.norm_weight is None or self.norm_bias is None:
            delta = slope(pre[-1] - target)
        else:  # through z ↦ γ x̂ + β, x̂ = (z − mean) / std
            x_hat, std = self._standardised(pre[-1])
            e = slope(self.norm_weight * x_hat + self.norm_bias - target) * self.norm_weight
            delta = (e - e.mean(-1, keepdim=True) - x_hat * (e * x_hat).mean(-1, keepdim=True)) / std
        weight_gradients, bias_gradients = [], []
        for depth in reversed(range(len(weights))):
            weight_gradients.insert(0, outer(inputs[depth], delta))
            bias_gradients.insert(0, delta)
            if depth > 0:
                delta = torch.einsum("bhij,bhj->bhi", weights[depth], delta) * gelu_slope(pre[depth - 1], self.gelu)
        return weight_gradients, bias_gradients

    def _layers(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Every layer's input and pre-activation."""
        inputs, pre = [], []
        for W, b in zip(weights, biases, strict=True):
            inputs.append(x if not pre else gelu(pre[-1], self.gelu))
            z = torch.einsum("bhi,bhij->bhj", inputs[-1], W)
            pre.append(z if b is None else z + b)
        return inputs, pre

    def _standardised(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z − mean) / std and std = √(var + ε), over the channels."""
        centred = z - z.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / std, std


def gelu(z: Tensor, form: str) -> Tensor:
    """GELU, either by its tanh approximation or exactly ("erf")."""
    if form == "tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def gelu_slope(z: Tensor, form: str) -> Tensor:
    """The derivative of `gelu`."""
    if form == "tanh":
        th = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        return 0.5 * (1 + th) + 0.5 * z * (1 - th**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    W1: Tensor,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    position: Tensor,
    mini_batch: int,
    residual: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TTT-Linear, Sun et al. 2024 (2407.04620), primal form; M(x) = x + LN(x W1 + b1).

    W_i = W_0 − Σ_{s≤i} max(0, 1/i + δ_i) η_s ∇ℓ_s(W_0),   o_i = M(q_i; W_i),   ℓ_s = ½‖M(k_s) − v_s‖²,

    i = 1..b within a mini-batch, W_0 the weights at its start, which are W_b of the one before. rate is the whole η_s,
    its 1/d included, [B, T, H]; position is δ [H, b]. The state is what the last token read.
    """
    memory = Memory(norm_weight, norm_bias, residual, "tanh")
    return _ttt(q, k, v, rate, [W1], [b1], memory, position, mini_batch)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    W1: Tensor,
    b1: Tensor | None,
    W2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    position: Tensor,
    mini_batch: int,
    residual: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TTT-MLP, Sun et al. 2024 (2407.04620): `ttt_linear` with M(x) = x + LN(GELU(x W1 + b1) W2 + b2), tanh-GELU."""
    memory = Memory(norm_weight, norm_bias, residual, "tanh")
    return _ttt(q, k, v, rate, [W1, W2], [b1, b2], memory, position, mini_batch)


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    momentum: Tensor,
    log_decay: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mini_batch: int = 1,
    residual: bool = True,
    gelu: str = "tanh",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The neural memory of Titans, Behrouz et al. 2025 (2501.00663), eqs. (13) to (15), for a memory of any depth.

    N_t = η_t N_{t-1} − θ_t ∇ℓ(M_{t'}; k_t, v_t),   M_t = (1 − α_t) M_{t-1} + N_t,   o_t = M_t(q_t),

    t' the token before the mini-batch of t, so that mini_batch = 1 is the online form. log_decay is log(1 − α). The
    loss is ½‖M(k) − v‖² where the paper has no ½: step is 2θ of the paper. The paper leaves the network open; this one
    is M(x) = x + LN(MLP(x)) without biases. The state is the weights and, as momentum_W1 and so on, the surprise N.
    """
    memory = Memory(norm_weight, norm_bias, residual, gelu)
    no_biases = [None] * len(weights)
    current = [W.expand(q.shape[0], *W.shape) for W in weights]
    surprise = [torch.zeros_like(W) for W in current]
    frozen, outputs = current, []
    for t in range(q.shape[1]):
        if t % mini_batch == 0:
            frozen = current
        gradients, _ = memory.gradients(frozen, no_biases, k[:, t], v[:, t])
        keep, rate, decay = scalar(momentum[:, t]), scalar(step[:, t]), scalar(log_decay[:, t].exp())
        surprise = [keep * N - rate * g for N, g in zip(surprise, gradients, strict=True)]
        current = [decay * M + N for M, N in zip(current, surprise, strict=True)]
        outputs.append(memory.predict(current, no_biases, q[:, t]))
    state = {f"W{depth + 1}": W for depth, W in enumerate(current)}
    state |= {f"momentum_W{depth + 1}": N for depth, N in enumerate(surprise)}
    return torch.stack(outputs, 1), state


def _ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    memory: Memory,
    position: Tensor,
    mini_batch: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both TTT layers: the mini-batch's gradients so far, summed, times the reader's factor, off its first weights."""
    batch, outputs = q.shape[0], []
    W_0 = [W.expand(batch, *W.shape) for W in weights]
    b_0 = [None if b is None else b.expand(batch, *b.shape) for b in biases]
    W_i, b_i = W_0, b_0
    W_sum, b_sum = [], []
    for t in range(q.shape[1]):
        i = t % mini_batch
        if i == 0:
            W_0, b_0 = W_i, b_i
            W_sum = [torch.zeros_like(W) for W in W_0]
            b_sum = [W.new_zeros(W[..., 0, :].shape) for W in W_0]
        W_gradients, b_gradients = memory.gradients(W_0, b_0, k[:, t], v[:, t])
        W_sum = [total + scalar(rate[:, t]) * g for total, g in zip(W_sum, W_gradients, strict=True)]
        b_sum = [total + rate[:, t, :, None] * g for total, g in zip(b_sum, b_gradients, strict=True)]
        factor = (1 / (i + 1) + position[:, i]).clamp(min=0)
        W_i = [W - scalar(factor) * total for W, total in zip(W_0, W_sum, strict=True)]
        b_i = [None if b is None else b - factor[:, None] * total for b, total in zip(b_0, b_sum, strict=True)]
        outputs.append(memory.predict(W_i, b_i, q[:, t]))
    state = {f"W{depth + 1}": W for depth, W in enumerate(W_i)}
    state |= {f"b{depth + 1}": b for depth, b in enumerate(b_i) if b is not None}
    return torch.stack(outputs, 1), state
