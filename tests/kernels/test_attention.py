"""Softmax attention: the fast path against the definition, the definition against masked softmax."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ttr
from ttr.kernels.problem import Problem
from ttr.kernels.torch import attention

N, H, DK, DV = 3, 2, 5, 4
WINDOWS = [None, 1, 4, 100, (4, 3), (1, 1), (2, 50)]  # or (window, prefix)


Window = int | tuple[int, int] | None


def kernel(window: Window) -> dict:
    window, prefix = window if isinstance(window, tuple) else (window, 0)
    return {"kind": "kernel", "window": window, "prefix": prefix}


def make(T: int, *, window: Window = None, past: int = 0, seed: int = 0, lengths: list[int] | None = None) -> Problem:
    """A float64 problem whose cache holds `past` pairs (fewer where the window is shorter)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spec = ttr.spec({"regressor": kernel(window)})
    state = attention.initial_state(spec, {}, N, H, DK, DV, torch.float64, "cpu")
    problem = Problem(
        spec=spec, q=draw(N, H, T, DK), k=draw(N, H, T, 1, DK), v=draw(N, H, T, 1, DV), write_key=None,
        signals={}, log_decay=None, params={}, state=state, lengths=lengths,
    )  # fmt: skip
    return replace(problem, state=attention.sdpa(make(past, window=window, seed=1))[1]) if past else problem


def dense(problem: Problem) -> torch.Tensor:
    """softmax(q k^T + mask) v in one line, for a problem without a cache."""
    T, window, prefix = problem.q.shape[2], problem.spec.regressor.window, problem.spec.regressor.prefix
    back = torch.arange(T)[:, None] - torch.arange(T)
    mask = (back >= 0) & ((back < (T if window is None else window)) | (torch.arange(T) < prefix))
    scores = (problem.q @ problem.k[..., 0, :].mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ problem.v[..., 0, :]


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert torch.isfinite(left).all()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


def everything(run, problem: Problem) -> dict[str, torch.Tensor]:
    """Outputs, cache, and the gradient of a random scalar of both with respect to q, k, v and the cache it began with."""
    x = {"q": problem.q, "k": problem.k, "v": problem.v, **{f"initial {c}": problem.state.weights[c] for c in "kv"}}
    x = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    weights = {**problem.state.weights, "k": x["initial k"], "v": x["initial v"]}
    o, state = run(replace(problem, q=x["q"], k=x["k"], v=x["v"], state=replace(problem.state, weights=weights)))
    if problem.valid is not None:
        o = torch.where(problem.valid[:, None, :, None], o, 0)
    generator = torch.Generator().manual_seed(5)
    results = {"o": o, "final k": state.weights["k"], "final v": state.weights["v"]}
    scalar = sum((torch.randn(t.shape, generator=generator, dtype=t.dtype) * t).sum() for t in results.values())
    grads = torch.autograd.grad(scalar, list(x.values()), allow_unused=True, materialize_grads=True)
    out = {**results, "length": state.weights["length"], **{f"d {name}": g for name, g in zip(x, grads, strict=True)}}
    return {name: t.detach() for name, t in out.items()}


def same_everything(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in right:
        same(left[name], right[name])


def cut(problem: Problem, part: slice, state=None) -> Problem:
    q, k, v = (x[:, :, part] for x in (problem.q, problem.k, problem.v))
    return replace(problem, q=q, k=k, v=v, state=state or problem.state)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("past", [0, 3, 9])
@pytest.mark.parametrize("T", [1, 15, 33])
def test_sdpa_is_the_definition(T, past, window):
    problem = make(T, window=window, past=past)
    same_everything(everything(attention.sdpa, problem), everything(attention.definition, problem))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_definition_is_masked_softmax(window):
    problem = make(20, window=window)
    same(attention.definition(problem)[0], dense(problem))
    same(attention.sdpa(problem)[0], dense(problem))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("run", [attention.sdpa, attention.definition])
@pytest.mark.parametrize("cuts", [[1], [7], [3, 4, 5, 6, 11]])
def test_prefill_then_decode_is_one_pass(window, run, cuts):
    problem = make(12, window=window)

    def in_parts(p: Problem):
        outputs, state = [], p.state
        for first, last in zip([0, *cuts], [*cuts, 12], strict=True):
            o, state = run(cut(p, slice(first, last), state))
            outputs.append(o)
        return torch.cat(outputs, 2), state

    same_everything(everything(in_parts, problem), everything(attention.definition, problem))


@pytest.mark.parametrize("window", WINDOWS)
def test_ragged_sequences(window):
    """Sequences of unlike lengths run together, twice, as they run alone; the second time from unlike caches."""
    first, second = make(9, window=window, lengths=[9, 2, 0]), make(6, window=window, seed=2, lengths=[1, 6, 4])
    for run in (attention.sdpa, attention.definition):
        _, state = run(first)
        together = replace(second, state=state)
        same_everything(everything(run, together), everything(attention.definition, together))
        o, last = run(together)
        for n in range(N):
            _, alone = run(first.sequence(n))
            one, end = run(replace(second.sequence(n), state=alone))
            length = int(end.weights["length"])
            most = sum(window) if isinstance(window, tuple) else window or 100
            assert length == min(first.lengths[n] + second.lengths[n], most) == int(last.weights["length"][n])
            same(o[n : n + 1, :, : second.lengths[n]], one)
            for name in "kv":
                cache = last.weights[name][n : n + 1]
                same(cache[:, :, cache.shape[2] - length :], end.weights[name][:, :, end.weights[name].shape[2] - length :])
                assert cache[:, :, : cache.shape[2] - length].abs().sum() == 0


def test_padding_is_never_attended():
    problem = make(8, lengths=[8, 3, 5])
    noisy = replace(problem, k=problem.k.clone(), v=problem.v.clone())
    for n, length in enumerate(problem.lengths):
        noisy.k[n, :, length:] += 3.0
        noisy.v[n, :, length:] = 1e3
    for name, value in everything(attention.sdpa, problem).items():
        if not name.startswith("d "):
            same(everything(attention.sdpa, noisy)[name], value)
    grads = everything(attention.sdpa, noisy)
    for n, length in enumerate(problem.lengths):
        assert grads["d k"][n, :, length:].abs().sum() == grads["d v"][n, :, length:].abs().sum() == 0


def test_a_window_bounds_the_cache():
    for T in (1, 3, 4, 20):
        k = attention.sdpa(make(T, window=4))[1].weights["k"]
        assert k.shape == (N, H, min(T, 4), DK)
    assert attention.sdpa(make(1, window=4, past=50))[1].nbytes == attention.sdpa(make(1, window=4, past=4))[1].nbytes


def test_equal_keys_average_the_values():
    problem = make(10)
    problem = replace(problem, k=problem.k[:, :, :1].expand_as(problem.k))
    v = problem.v[..., 0, :]
    mean = v.cumsum(2) / torch.arange(1, 11, dtype=torch.float64)[:, None]
    same(attention.sdpa(problem)[0], mean)


def test_r36_unit_keys_are_a_gaussian_kernel():
    """exp(q^T k) and exp(-||q - k||^2 / 2) weigh keys of one length alike."""
    problem = make(10)
    problem = replace(problem, k=torch.nn.functional.normalize(problem.k, dim=-1))
    squared = (problem.q[:, :, :, None] - problem.k[:, :, None, :, 0]).square().sum(-1)
    weights = (-squared / 2).exp().tril()
    same(attention.sdpa(problem)[0], (weights / weights.sum(-1, keepdim=True)) @ problem.v[..., 0, :])


def test_a_prefix_stays_in_sight_and_in_the_cache():
    problem = make(20, window=(4, 3))
    v = problem.v.clone()
    v[:, :, 1] += 1.0
    moved = attention.sdpa(replace(problem, v=v))[0] - attention.sdpa(problem)[0]
    assert (moved.abs().amax((0, 1, 3))[1:] > 0).all()
    _, state = attention.sdpa(problem)
    assert state.weights["k"].shape == (N, H, 7, DK) and state.weights["length"].tolist() == [7] * N
    assert torch.equal(state.weights["k"], problem.k[:, :, [0, 1, 2, 16, 17, 18, 19], 0])
    assert "i < 3" in ttr.explain(problem.spec).recurrence[0] and ttr.explain(problem.spec, T=50).flops_per_token == 2 * 7 * 128
