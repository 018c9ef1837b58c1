"""Linear attention, its decays, mLSTM and softmax: how they reduce to one another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from . import hebbian as tr
from .checks import DK, B, H, T, both, per_key, same
from .softmax import softmax, softmax_window


def test_recurrence_is_the_sum_over_the_past(qkv, draw):
    """S_T = Σ B_t ∏_{s>t} A_s (F3), written out as a masked product for every kind of decay."""
    q, k, v = qkv
    g = F.logsigmoid(draw(B, T, H, DK))
    total = g.cumsum(1)
    scores = torch.einsum("bthd,bshd,btshd->bths", q, k, (total[:, :, None] - total[:, None]).exp())
    mask = torch.ones(T, T, dtype=torch.float64).tril()
    expected = torch.einsum("bths,ts,bshv->bthv", scores, mask, v) * DK**-0.5
    same(tr.gla(q, k, v, log_decay=g)[0], expected)


def test_normaliser_is_the_sum_of_the_weights(qkv):
    q, k, v = (F.elu(qkv[0]) + 1, F.elu(qkv[1]) + 1, qkv[2])
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    output, state = tr.linear_attention(q, k, v)
    same(output, expected)
    same(state["W"], tr.linear_attention_unnormalised(q, k, v)[1])
    same(tr.linear_attention(q, k, v, scale=0.3)[0], expected)


def test_r04_gla_with_equal_channels_is_mamba2(qkv, step, log_decay):
    q, k, v = qkv
    mamba2 = tr.mamba2(q, k, v, step=step, log_decay=log_decay)
    both(tr.gla(q, k, step[..., None] * v, log_decay=per_key(log_decay), scale=1.0), mamba2)


def test_r05_without_decay_is_linear_attention(qkv, step):
    q, k, v = qkv
    plain = tr.linear_attention_unnormalised(q, k, v)
    both(tr.gla(q, k, v, log_decay=torch.zeros(B, T, H, DK, dtype=torch.float64)), plain)
    mamba2 = tr.mamba2(q, k, v, step=torch.ones_like(step), log_decay=torch.zeros_like(step), scale=DK**-0.5)
    both(mamba2, plain)


def test_r06_retnet_is_a_constant_scalar_gate(qkv, step):
    q, k, v = qkv
    gamma = torch.tensor([31 / 32, 63 / 64, 127 / 128], dtype=torch.float64)
    constant = gamma.log().expand(B, T, H)
    expected = tr.mamba2(q, k, v, step=torch.ones_like(step), log_decay=constant, scale=DK**-0.5)
    both(tr.retnet(q, k, v), expected)


def test_lightning_is_a_constant_scalar_gate(qkv, step):
    """Head 0 and the (absent) layer L never forget; the published slopes otherwise."""
    q, k, v = qkv
    rates = torch.tensor([0.0, 8 / 3, 16 / 3], dtype=torch.float64) * (1 - 2 / 5)
    constant = -rates.expand(B, T, H)
    expected = tr.mamba2(q, k, v, step=torch.ones_like(step), log_decay=constant, scale=DK**-0.5)
    both(tr.lightning(q, k, v, layer=2, n_layers=5), expected)
    both(tr.lightning(q, k, v, layer=5, n_layers=5), tr.linear_attention_unnormalised(q, k, v))


def test_r31_mlstm_without_gates_is_linear_attention(qkv, step):
    """f = 1, i = 1: the plain sums; where |n·q| ≤ 1 the denominator is 1, and the output is linear attention's."""
    q, k, v = qkv
    zero = torch.zeros_like(step)
    output, state = tr.mlstm(0.01 * q, k, v, log_input=zero, log_forget=zero)
    linear, W = tr.linear_attention_unnormalised(0.01 * q, k, v)
    same(output, linear)
    same(state["m"].exp()[..., None, None] * state["W"], W * DK**-0.5)


@pytest.mark.parametrize("size", [1.0, 5.0])
def test_r31_mlstm_stabilised_is_unstabilised_and_parallel(qkv, draw, size):
    q, k, v = qkv
    log_input, log_forget = size * draw(B, T, H), F.logsigmoid(draw(B, T, H) + 1)
    output, state = tr.mlstm(q, k, v, log_input=log_input, log_forget=log_forget)
    numerator, W = tr.mamba2(q, k, v, step=log_input.exp(), log_decay=log_forget, scale=DK**-0.5)
    ones = torch.ones(B, T, H, 1, dtype=torch.float64)
    weight, n = tr.mamba2(q, k, ones, step=log_input.exp(), log_decay=log_forget, scale=DK**-0.5)
    same(output, numerator / weight.abs().clamp(min=1))
    stabiliser = state["m"].exp()
    same(stabiliser[..., None, None] * state["W"], W * DK**-0.5)
    same(stabiliser[..., None] * state["normaliser"], n[..., 0] * DK**-0.5)
    total = log_forget.cumsum(1).transpose(1, 2)
    log_gates = total[..., :, None] - total[..., None, :] + log_input.transpose(1, 2)[:, :, None]
    log_gates = log_gates.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    m = log_gates.amax(-1, keepdim=True)
    C = torch.einsum("bthd,bshd->bhts", q, k) * DK**-0.5 * (log_gates - m).exp()
    parallel = C / torch.maximum(C.sum(-1, keepdim=True).abs(), (-m).exp())
    same(output, torch.einsum("bhts,bshv->bthv", parallel, v))


def test_s5_mlstm_is_finite_for_large_input_gates(qkv, draw):
    sign = draw(B, T, H).sign()
    output, _ = tr.mlstm(*qkv, log_input=50 * sign, log_forget=F.logsigmoid(draw(B, T, H)))
    assert torch.isfinite(output).all()


def test_softmax_is_torch_s_and_a_window_is_its_mask(qkv):
    q, k, v = qkv
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    same(softmax(q, k, v)[0], F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2))
    band = torch.ones(T, T).tril().triu(-2).bool()
    windowed, cache = softmax_window(q, k, v, window=3)
    same(windowed, F.scaled_dot_product_attention(*heads_first, attn_mask=band).transpose(1, 2))
    same(cache["k"], k[:, -3:])
    same(softmax_window(q, k, v, window=T)[0], softmax(q, k, v)[0])


def test_r36_unit_keys_make_softmax_a_gaussian_smoother(qkv):
    q, k, v = qkv
    bandwidth = 0.7
    distances = (q.transpose(1, 2)[:, :, :, None] - k.transpose(1, 2)[:, :, None]).square().sum(-1)
    weights = (-distances / (2 * bandwidth)).exp().tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    same(softmax(q, k, v, scale=1 / bandwidth)[0], expected)
