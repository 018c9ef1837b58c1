"""LaCT: hand-written gradients, what Muon and the norms keep, and when a chunk is seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from . import fast_weights as tr
from .checks import B, H, T, same, unit

D, HIDDEN, CHUNK = 4, 6, 3


@pytest.fixture
def given(draw):
    q, k, v = draw(B, T, H, D), unit(draw(B, T, H, D)), draw(B, T, H, D)
    signals = {"rates": draw(B, T, H, 3).sigmoid(), "momentum": draw(B, T, H).sigmoid()}
    weights = {"W_0": draw(H, HIDDEN, D), "W_1": draw(H, D, HIDDEN), "W_2": draw(H, HIDDEN, D)}
    return {"q": q, "k": k, "v": v, **signals, **weights, "chunk": CHUNK}


def test_hand_written_gradients_are_autograd_s(draw):
    weights = tuple(draw(B, H, *shape).requires_grad_() for shape in ((HIDDEN, D), (D, HIDDEN), (HIDDEN, D)))
    k, v = draw(B, H, D), draw(B, H, D)
    W_0, W_1, W_2 = weights
    x = k[..., None]
    f = W_1 @ (F.silu(W_0 @ x) * (W_2 @ x))
    for mine, torchs in zip(tr.ascent(weights, k, v), torch.autograd.grad((f[..., 0] * v).sum(), weights), strict=True):
        same(mine.detach(), torchs)


def test_newton_schulz_brings_singular_values_near_one(draw):
    singular = torch.linalg.svdvals(tr.orthogonalised(draw(B, H, D, HIDDEN)))
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_rows_keep_their_length(given):
    _, state = tr.lact(**given)
    for name in ("W_0", "W_1", "W_2"):
        same(state[name].norm(dim=-1), given[name].norm(dim=-1).expand(B, H, -1))
        assert (state[name] - given[name]).abs().max() > 0.1


def test_a_chunk_is_seen_from_the_next_one_on(given):
    before, _ = tr.lact(**given)
    k = given["k"].clone()
    k[:, CHUNK] = -k[:, CHUNK]
    changed = (tr.lact(**{**given, "k": k})[0] - before).abs().amax((0, 2, 3))
    assert (changed[: 2 * CHUNK] == 0).all() and (changed[2 * CHUNK :] > 0).all()


def test_shorter_than_a_chunk_is_read_with_the_initial_weights(given):
    output, state = tr.lact(**{**given, "chunk": T + 1})
    x = given["q"][..., None]
    same(output, (given["W_1"] @ (F.silu(given["W_0"] @ x) * (given["W_2"] @ x)))[..., 0])
    assert all(not state[f"momentum_W_{i}"].any() for i in range(3))
