"""What holds for every transcription: causality, gradients, states handed on. Reductions: transcriptions/test_*.py."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transcriptions as tr
from torch import Tensor
from transcriptions.checks import DK, DV, B, H, T, both, per_key, unit


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Normal numbers from one seeded stream, float64."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def every_transcription(draw) -> dict[str, Callable[..., tuple]]:
    """Outputs and states as functions of q, k, v (all of width DK), a rate in (0, 1) and a log decay, both per head."""
    ridge, W1, W2 = 0.25 + draw(H, DK).exp(), draw(H, DK, 2 * DK), draw(H, 2 * DK, DK)
    b1, b2, W, position = draw(H, 2 * DK), draw(H, DK), draw(H, DK, DK), 0.1 * draw(H, 4)
    gain, shift = 1 + 0.3 * draw(H, DK), 0.3 * draw(H, DK)
    ttt = functools.partial(tr.ttt_linear, W1=W, b1=b2)
    mlp = functools.partial(tr.ttt_mlp, W1=W1, b1=b1, W2=W2, b2=b2)
    batches = {"norm_weight": gain, "norm_bias": shift, "position": position, "mini_batch": 4}
    titans = functools.partial(tr.titans, weights=[W1, W2], norm_weight=gain, norm_bias=shift, mini_batch=4)

    trained = {"norm_weight": gain, "norm_bias": shift, "mini_batch": 4}
    yaad, moneta = (functools.partial(f, weights=[W1, W2], **trained) for f in (tr.yaad, tr.moneta))
    memora = functools.partial(tr.memora, weights=[W1.softmax(-2), W2.softmax(-2)], **trained)

    omeganet, atlas = (functools.partial(f, weights=[W1, W2], mini_batch=4) for f in (tr.omeganet, tr.atlas))

    def gamma(s: Tensor) -> Tensor:
        return torch.stack([s, 1 - s, s * s], -1)

    swiglu = {"W_0": W1.mT, "W_1": W2.mT, "W_2": W1.mT.flip(-1)}
    lact = functools.partial(tr.lact, **swiglu, chunk=4)

    def twice(x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(-1)], 2)

    def varied(g: Tensor, k: Tensor) -> Tensor:
        return per_key(g) * k.square()

    return {
        "linear_attention": lambda q, k, v, s, g: tr.linear_attention(q.exp(), k.exp(), v),
        "linear_attention_unnormalised": lambda q, k, v, s, g: tr.linear_attention_unnormalised(q, k, v),
        "retnet": lambda q, k, v, s, g: tr.retnet(q, k, v),
        "lightning": lambda q, k, v, s, g: tr.lightning(q, k, v, layer=1, n_layers=3),
        "gla": lambda q, k, v, s, g: tr.gla(q, k, v, log_decay=varied(g, k)),
        "mamba2": lambda q, k, v, s, g: tr.mamba2(q, k, v, step=s, log_decay=g),
        "mlstm": lambda q, k, v, s, g: tr.mlstm(q, k, v, log_input=s.log(), log_forget=g),
        "deltanet": lambda q, k, v, s, g: tr.deltanet(q, k, v, step=s),
        "gated_deltanet": lambda q, k, v, s, g: tr.gated_deltanet(q, k, v, step=s, log_decay=g),
        "kda": lambda q, k, v, s, g: tr.kda(q, k, v, step=s, log_decay=varied(g, k)),
        "rwkv7": lambda q, k, v, s, g: tr.rwkv7(q, k, v, write_key=v, step=per_key(s), log_decay=varied(g, k)),
        "dplr": lambda q, k, v, s, g: tr.dplr(q, k, v, left=-k, right=s[..., None] * k, log_decay=varied(g, k)),
        "deltaproduct": lambda q, k, v, s, g: tr.deltaproduct(q, twice(k), twice(v), step=twice(s)),
        "gated_deltaproduct": lambda q, k, v, s, g: tr.gated_deltaproduct(q, twice(k), twice(v), step=twice(s), log_decay=g),
        "longhorn": lambda q, k, v, s, g: tr.longhorn(q, k, v, step=per_key(s)),
        "momentum_deltanet": lambda q, k, v, s, g: tr.momentum_deltanet(q, k, v, step=s, momentum=0.5 * s, log_decay=g),
        "rls": lambda q, k, v, s, g: tr.rls(q, k, v, ridge=ridge, weight=s, log_decay=g),
        "mesa": lambda q, k, v, s, g: tr.mesa(q, k, v, ridge=ridge),
        "mesanet": lambda q, k, v, s, g: tr.mesanet(q, k, v, weight=s, log_decay=g, ridge=ridge),
        "ttt_linear": lambda q, k, v, s, g: ttt(q, k, v, rate=s, **batches),
        "ttt_mlp": lambda q, k, v, s, g: mlp(q, k, v, rate=0.1 * s, **batches),
        "titans": lambda q, k, v, s, g: titans(q, k, v, step=0.1 * s, momentum=0.5 * s, log_decay=g),
        "lact": lambda q, k, v, s, g: lact(q, k, v, rates=torch.stack([s, s * s, 1 - s], -1), momentum=s),
        "yaad": lambda q, k, v, s, g: yaad(q, k, v, step=0.1 * s, threshold=3 * s, log_decay=g),
        "moneta": lambda q, k, v, s, g: moneta(q, k, v, step=0.02 * s, log_decay=0.1 * g),
        "memora": lambda q, k, v, s, g: memora(q, k, v, step=0.1 * s, log_decay=g),
        "omeganet": lambda q, k, v, s, g: omeganet(q, k, v, step=0.1 * s, log_decay=g, gamma=gamma(s)),
        "atlas": lambda q, k, v, s, g: atlas(q, k, v, step=0.1 * s, momentum=0.5 * s, log_decay=g, gamma=gamma(s)),
        "softmax": lambda q, k, v, s, g: tr.softmax(q, k, v),
        "softmax_window": lambda q, k, v, s, g: tr.softmax_window(q, k, v, window=3),
    }


@pytest.mark.parametrize("name", tr.__all__)
def test_f5_no_output_sees_the_future(draw, name):
    """A changed token changes nothing before it, and something from it on."""
    run = every_transcription(draw)[name]
    inputs = [
        draw(B, T, H, DK),
        unit(draw(B, T, H, DK)),
        draw(B, T, H, DK),
        draw(B, T, H).sigmoid(),
        -draw(B, T, H).exp(),
    ]
    changed, at = [x.clone() for x in inputs], 6
    for x in changed:
        x[:, at] *= 0.5
    (before, _), (after, _) = run(*inputs), run(*changed)
    assert torch.equal(before[:, :at], after[:, :at])
    assert (before[:, at:] - after[:, at:]).abs().max() > 1e-6


@pytest.mark.parametrize("name", tr.__all__)
def test_every_transcription_is_differentiable(draw, name):
    """Gradients with respect to every input agree with finite differences."""
    run = every_transcription(draw)[name]
    length = 5
    inputs = (
        draw(1, length, H, DK),
        unit(draw(1, length, H, DK)),
        draw(1, length, H, DK),
        draw(1, length, H).sigmoid(),
        -draw(1, length, H).exp(),
    )
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(lambda *x: run(*x)[0], inputs, fast_mode=True)


@pytest.mark.parametrize("split", [1, 4, 10])
def test_f4_a_state_can_be_handed_on(draw, split):
    """run(first part), then run(the rest from its state), is run(all)."""
    q, k, v = draw(B, T, H, DK), unit(draw(B, T, H, DK)), draw(B, T, H, DV)
    step, log_decay = draw(B, T, H).sigmoid(), F.logsigmoid(draw(B, T, H) + 1)
    g, write_key = F.logsigmoid(draw(B, T, H, DK)), draw(B, T, H, DK)
    k_n, v_n = unit(draw(B, T, 2, H, DK)), draw(B, T, 2, H, DV)
    runs: list[tuple[Callable, list[Tensor], dict[str, Tensor]]] = [
        (tr.linear_attention_unnormalised, [q, k, v], {}),
        (tr.retnet, [q, k, v], {}),
        (tr.lightning, [q, k, v], {}),
        (tr.gla, [q, k, v], {"log_decay": g}),
        (tr.mamba2, [q, k, v], {"step": step, "log_decay": log_decay}),
        (tr.deltanet, [q, k, v], {"step": step}),
        (tr.gated_deltanet, [q, k, v], {"step": step, "log_decay": log_decay}),
        (tr.kda, [q, k, v], {"step": step, "log_decay": g}),
        (tr.rwkv7, [q, k, v], {"write_key": write_key, "step": per_key(step), "log_decay": g}),
        (tr.longhorn, [q, k, v], {"step": step}),
        (tr.gated_deltaproduct, [q, k_n, v_n], {"step": torch.stack([step, step], 2), "log_decay": log_decay}),
    ]
    for function, arrays, signals in runs:
        whole = function(*arrays, **signals)
        first = function(*(x[:, :split] for x in arrays), **{n: x[:, :split] for n, x in signals.items()})
        rest = {n: x[:, split:] for n, x in signals.items()}
        second = function(*(x[:, split:] for x in arrays), **rest, state=first[1])
        both((torch.cat([first[0], second[0]], 1), second[1]), whole)
