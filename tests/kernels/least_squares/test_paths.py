"""Every path of least squares against the definition; prefill and decode, padding, the size of the state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ttr.kernels.problem import Problem
from ttr.kernels.torch import least_squares

from .problems import DK, SOME, SPECS, H, N, chunk, close, everything, leaves, make, same, with_leaves


@pytest.mark.parametrize(("name", "T"), [(name, T) for name in SPECS for T in (1, 15, 65) if T < 65 or name in SOME])
def test_paths_are_the_definition(name, T):
    problem = make(SPECS[name], T)
    expected = everything(least_squares.definition, problem)
    same(everything(least_squares.recurrent, problem), expected)
    for size in {1: [64], 15: [1, 5], 65: [64]}[T]:
        same(everything(chunk(size), problem), expected)


@pytest.mark.parametrize("name", [name for name in SPECS if "constant" in name and "none" not in name])
def test_extreme_gates(name):
    problem = make(SPECS[name], 24, extreme=True)
    expected = everything(least_squares.definition, problem)
    for run in (least_squares.recurrent, chunk(8), chunk(64)):
        same(everything(run, problem), expected)


@pytest.mark.parametrize("name", [name for name in SPECS if "decaying" in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forgotten_ridge_stays_finite(name, dtype):
    """What such a gate leaves of M is lost to rounding, so only finiteness can be asked."""
    problem = make(SPECS[name], 30, extreme=True)
    problem = with_leaves(problem, {name: t.to(dtype) for name, t in leaves(problem).items()})
    for run in (least_squares.recurrent, chunk(16)):
        for key, value in everything(run, problem).items():
            assert torch.isfinite(value).all(), key


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("split", [1, 16, 23])
def test_prefill_then_decode_is_one_pass(name, split):
    problem = make(SPECS[name], 25, started=False)

    def cut(p: Problem, part: slice, state=None) -> Problem:
        def at(x):
            return x[:, :, part]

        return replace(
            p, q=at(p.q), k=at(p.k), v=at(p.v), signals={"weight": at(p.signals["weight"])},
            log_decay=None if p.log_decay is None else at(p.log_decay), state=state or p.state,
        )  # fmt: skip

    def in_two(p: Problem):
        first, state = least_squares.chunk(cut(p, slice(0, split)), chunk_size=8)
        second, state = least_squares.recurrent(cut(p, slice(split, None), state))
        return torch.cat([first, second], 2), state

    same(everything(in_two, problem), everything(least_squares.definition, problem))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("run", [least_squares.definition, least_squares.recurrent, chunk(8)])
def test_padding_is_no_event(name, run):
    """Whatever lies behind a sequence's end, sequences run together as they run alone."""
    problem = make(SPECS[name], 21, extreme="constant" in name)
    lengths = [21, 6]
    padded = replace(problem, lengths=lengths)
    if problem.log_decay is not None:
        problem.log_decay[1, :, 6:] = -float("inf")
    o, state = run(padded)
    for i, length in enumerate(lengths):
        alone, last = run(padded.sequence(i))
        close(o[i : i + 1, :, :length], alone)
        for key, w in last.weights.items():
            close(state.weights[key][i : i + 1], w)
    grads = everything(run, padded)
    assert grads["d weight"][1, :, 6:].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_a_sequence_may_be_empty():
    problem = replace(make(SPECS["cg-vector-constant-after"], 5), lengths=[5, 0])
    for run in (least_squares.definition, least_squares.recurrent, chunk(4)):
        state = run(problem)[1]
        close(state.weights["H"][1], problem.state.weights["H"][1])


def test_the_state_has_constant_size():
    for name in SOME:
        sizes = {least_squares.recurrent(make(SPECS[name], T))[1].nbytes for T in (1, 7, 50)}
        assert sizes == {make(SPECS[name], 1, started=False).state.nbytes}


# Identities of the literature, on `chunk` and on the recursion


def test_rls_meets_old_keys_again_after_long_forgetting():
    """Float32 and a gate that forgets each token almost at once: P is held, nothing runs away."""
    spec = {"regressor": {"kind": "least_squares", "ridge_decays": True}, "optimizer": "rls", "gate": "scalar"}
    problem = make(spec, 400, started=False)
    problem = with_leaves(problem, {name: t.float() for name, t in leaves(problem).items()})
    k = F.one_hot(torch.arange(400) // 100, DK).float()[None, None, :, None].expand(N, H, 400, 1, DK)
    problem = replace(problem, k=k, log_decay=torch.full_like(problem.log_decay, -1.0))
    o, state = least_squares.recurrent(problem)
    assert o.abs().max() < 1e2
    assert all(torch.isfinite(w).all() for w in state.weights.values())


def test_a_bad_chunk_size_is_named():
    with pytest.raises(ValueError, match="chunk_size=0"):
        least_squares.chunk(make(SPECS["cg-none-constant-after"], 3), chunk_size=0)
