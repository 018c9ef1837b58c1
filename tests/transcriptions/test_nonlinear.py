"""TTT and Titans: hand-written gradients, dual forms, and linear memories as delta rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from . import nonlinear as tr
from .checks import DK, DV, B, H, T, both, same, unit
from .delta import deltanet, momentum_deltanet
from .hebbian import linear_attention_unnormalised


@pytest.mark.parametrize("form", ["tanh", "erf"])
@pytest.mark.parametrize("norm", [True, False])
def test_g1_hand_written_gradients_are_autograd_s(draw, form, norm):
    """Through GELU layers, LayerNorm and skip; the norm and GELU against torch's own."""
    d, hidden = 4, 6
    weights = [draw(B, H, d, hidden), draw(B, H, hidden, hidden), draw(B, H, hidden, d)]
    biases = [draw(B, H, hidden), draw(B, H, hidden), draw(B, H, d)]
    leaves = [x.requires_grad_() for x in weights + biases]
    gain, shift = (1 + draw(H, d), draw(H, d)) if norm else (None, None)
    k, v = draw(B, H, d), draw(B, H, d)
    x, approximate = k[..., None, :], "tanh" if form == "tanh" else "none"
    for depth, (W, b) in enumerate(zip(weights, biases, strict=True)):
        x = x @ W + b[..., None, :]
        x = F.gelu(x, approximate=approximate) if depth < 2 else x
    z = x[..., 0, :]
    if gain is not None and shift is not None:
        z = F.layer_norm(z, (d,), eps=1e-6) * gain + shift
    memory = tr.Memory(gain, shift, True, form)
    same(memory.predict(weights, biases, k).detach(), (k + z).detach())
    expected = torch.autograd.grad((k + z - v).square().sum() / 2, leaves)
    W_gradients, b_gradients = memory.gradients(weights, biases, k, v)
    for mine, torchs in zip(W_gradients + b_gradients, expected, strict=True):
        same(mine.detach(), torchs)


def test_r22_ttt_linear_token_by_token_is_deltanet(draw, step):
    q, k, v = draw(B, T, H, DK), unit(draw(B, T, H, DK)), draw(B, T, H, DK)
    W1, delta = draw(H, DK, DK), torch.zeros(H, 1, dtype=torch.float64)
    output, state = tr.ttt_linear(
        q,
        k,
        v,
        rate=step,
        W1=W1,
        b1=None,
        norm_weight=None,
        norm_bias=None,
        position=delta,
        mini_batch=1,
        residual=False,
    )
    both((output, state["W1"]), deltanet(q, k, v, step=step, scale=1.0, state=W1.expand(B, H, DK, DK)))


def test_r23_one_full_batch_from_zero_is_linear_attention(draw, step):
    """With the position factor made 1 by δ_i = 1 − 1/i."""
    q, k, v = draw(B, T, H, DK), unit(draw(B, T, H, DK)), draw(B, T, H, DK)
    delta = (1 - 1 / torch.arange(1, T + 1, dtype=torch.float64)).expand(H, T)
    output, state = tr.ttt_linear(
        q,
        k,
        v,
        rate=torch.ones_like(step),
        W1=torch.zeros(H, DK, DK, dtype=torch.float64),
        b1=None,
        norm_weight=None,
        norm_bias=None,
        position=delta,
        mini_batch=T,
        residual=False,
    )
    both((output, state["W1"]), linear_attention_unnormalised(q, k, v, scale=1.0))


def ln_l2(z: Tensor, target: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """∂/∂z ½‖LN(z) − target‖², rows of z [..., C, d]."""
    s = (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    x = (z - z.mean(-1, keepdim=True)) / s
    e = (gain * x + shift - target) * gain
    return (e - e.mean(-1, keepdim=True) - x * (e * x).mean(-1, keepdim=True)) / s


def test_f6_ttt_dual_form_is_the_primal(draw):
    """One mini-batch of TTT-MLP in matrices: Z̄ = Q W − (Η ⊙ Q Kᵀ) E + b − Η E, layer by layer."""
    C, d, hidden = 6, 4, 16
    q, k, v = (draw(B, C, H, d) for _ in range(3))
    rate, position = draw(B, C, H).sigmoid(), 0.3 * draw(H, C)
    W1, b1, W2, b2 = draw(H, d, hidden), draw(H, hidden), draw(H, hidden, d), draw(H, d)
    gain, shift = 1 + 0.3 * draw(H, d), 0.3 * draw(H, d)
    output, state = tr.ttt_mlp(
        q,
        k,
        v,
        rate=rate,
        W1=W1,
        b1=b1,
        W2=W2,
        b2=b2,
        norm_weight=gain,
        norm_bias=shift,
        position=position,
        mini_batch=C,
    )

    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, C, d]
    factor = (1 / torch.arange(1, C + 1, dtype=torch.float64) + position).clamp(min=0)
    steps = (factor[None, :, :, None] * rate.transpose(1, 2)[:, :, None]).tril()  # [B, H, reader, writer]
    gain, shift = gain[:, None], shift[:, None]
    Z1 = K @ W1 + b1[:, None]
    Z1.requires_grad_()
    X2 = F.gelu(Z1, approximate="tanh")
    E2 = ln_l2(X2 @ W2 + b2[:, None], V - K, gain, shift)
    (E1,) = torch.autograd.grad(X2, Z1, (E2 @ W2.mT).detach())
    X2, E2 = X2.detach(), E2.detach()
    Z1_bar = Q @ W1 - (steps * (Q @ K.mT)) @ E1 + b1[:, None] - steps @ E1
    X2_bar = F.gelu(Z1_bar, approximate="tanh")
    Z2_bar = X2_bar @ W2 - (steps * (X2_bar @ X2.mT)) @ E2 + b2[:, None] - steps @ E2
    expected = Q + F.layer_norm(Z2_bar, (d,), eps=1e-6) * gain + shift
    same(output, expected.transpose(1, 2))
    last = steps[:, :, -1, :, None]
    same(state["W1"], W1 - (last * K).mT @ E1)
    same(state["W2"], W2 - (last * X2).mT @ E2)
    same(state["b1"], b1 - (last * E1).sum(-2))
    same(state["b2"], b2 - (last * E2).sum(-2))


def test_r24_r25_r26_titans_with_a_linear_memory_is_momentum_deltanet(draw, step, log_decay):
    q, k, v = draw(B, T, H, DK), unit(draw(B, T, H, DK)), draw(B, T, H, DV)
    eta, start = draw(B, T, H).sigmoid(), torch.zeros(H, DK, DV, dtype=torch.float64)
    output, state = tr.titans(
        q,
        k,
        v,
        step=step,
        momentum=eta,
        log_decay=log_decay,
        weights=[start],
        norm_weight=None,
        norm_bias=None,
        residual=False,
    )
    expected, linear = momentum_deltanet(q, k, v, step=step, momentum=eta, log_decay=log_decay, scale=1.0)
    both((output, state["W1"]), (expected, linear["W"]))
    same(state["momentum_W1"], linear["momentum"])


def test_titans_chunk_in_closed_form(draw, step, log_decay):
    """One mini-batch of a linear memory from M_0: O = diag(B) Q M_0 − ((Q Kᵀ) ⊙ Γ) E, with Γ from the two scans."""
    q, k, v = draw(B, T, H, DK), unit(draw(B, T, H, DK)), draw(B, T, H, DV)
    eta, start = draw(B, T, H).sigmoid(), draw(H, DK, DV)
    output, state = tr.titans(
        q,
        k,
        v,
        step=step,
        momentum=eta,
        log_decay=log_decay,
        weights=[start],
        norm_weight=None,
        norm_bias=None,
        mini_batch=T,
        residual=False,
    )
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    rho, eta, theta = (x.transpose(1, 2) for x in (log_decay.exp(), eta, step))
    passed = torch.zeros(B, H, T, T, dtype=torch.float64)  # Γ
    for j in range(T):
        surprise = torch.zeros(B, H, dtype=torch.float64)
        weight = torch.zeros(B, H, dtype=torch.float64)
        for t in range(j, T):
            surprise = eta[..., t] * surprise + (theta[..., t] if t == j else 0)
            weight = rho[..., t] * weight + surprise
            passed[..., t, j] = weight
    E = K @ start - V
    kept = rho.cumprod(-1)[..., None]
    same(output, (kept * (Q @ start) - ((Q @ K.mT) * passed) @ E).transpose(1, 2))
    same(state["W1"], kept[..., -1:, :] * start - (passed[:, :, -1, :, None] * K).mT @ E)


def test_mini_batches_of_one_are_online(draw, step):
    """The gradient at the mini-batch's start is the gradient before the token, and only then."""
    q, k, v = (draw(B, T, H, DK) for _ in range(3))
    weights = [draw(H, DK, 7), draw(H, 7, DK)]
    settings = {"momentum": 0 * step, "log_decay": 0 * step, "norm_weight": None, "norm_bias": None}
    titans = tr.titans(q, k, v, step=0.1 * step, weights=weights, **settings)
    one = torch.zeros(H, 1, dtype=torch.float64)
    ttt = tr.ttt_mlp(
        q,
        k,
        v,
        rate=0.1 * step,
        W1=weights[0],
        b1=None,
        W2=weights[1],
        b2=None,
        norm_weight=None,
        norm_bias=None,
        position=one,
        mini_batch=1,
    )
    same(titans[0], ttt[0])
    same(titans[1]["W2"], ttt[1]["W2"])
    frozen = tr.titans(q, k, v, step=0.1 * step, weights=weights, mini_batch=3, **settings)
    assert (frozen[0] - titans[0]).abs().max() > 1e-3
