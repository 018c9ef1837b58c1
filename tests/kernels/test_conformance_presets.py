"""The conformance table, one row per preset (least squares and softmax among them): every path is the definition."""

import pytest
import torch

import ttr
from ttr import testing


def case_of(name: str, **more) -> testing.Inputs:
    # TTT's and Titans' mini-batches are shortened so that a few tokens cross several of them
    spec = ttr.spec(name, **({"optimizer": {"mini_batch": 4}} if ttr.spec(name).mini_batch != 1 else {}))
    # forgotten altogether, Moneta's weights have no norm to divide by
    case = testing.random_inputs(spec, dk=4, dv=4, correlation=0.2, extreme=name != "moneta", **more)
    if name in ("memora", "moneta", "omeganet", "yaad"):  # losses summed over channels or pairs: larger steps than theirs diverge
        case.tensors["step"] *= 0.1
    return case


def fast_paths(spec: ttr.Spec) -> list:
    return [path for path in testing.targets(spec) if path != "definition"]


@pytest.mark.parametrize("T", [1, 17, 65])
@pytest.mark.parametrize("name", ttr.presets())
def test_paths(name, T):
    case = case_of(name, T=T, B=1)
    expected = testing.evaluate(case, "definition")
    for path in fast_paths(case.spec):
        for option in [{"kind": path, "chunk_size": c} for c in (8, 32)] if path == "chunk" else [path]:
            testing.assert_close(testing.evaluate(case, option), expected, 1e-9, f"{name} {option} T={T}")


@pytest.mark.parametrize("name", ttr.presets())
def test_split_and_packed(name):
    case = case_of(name, T=13, B=3)
    whole = testing.evaluate(case, "definition")
    packed = testing.pack(case, [13, 1, 6])
    packed_whole = testing.evaluate(packed, "definition")
    for path in ["definition", *fast_paths(case.spec)]:
        testing.assert_close(testing.evaluate(case, path, splits=(2, 7)), whole, 1e-9, f"{name} {path} split")
        testing.assert_close(testing.evaluate(packed, path), packed_whole, 1e-9, f"{name} {path} packed")


@pytest.mark.parametrize("name", ttr.presets())
def test_definition_of_packed_is_that_of_each(name):
    """The packed definition itself is held against its sequences alone."""
    case = case_of(name, T=7, B=2)
    o, _ = testing.call(testing.pack(case, [7, 3]), "definition")
    for i, (start, length) in enumerate([(0, 7), (7, 3)]):
        initial = None if case.initial_state is None else case.initial_state[i : i + 1]
        alone = testing.Inputs(case.spec, {n: t[i : i + 1, :length] for n, t in case.tensors.items()}, case.params, initial)
        torch.testing.assert_close(o[:, start : start + length], testing.call(alone, "definition")[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ttr.presets())
def test_causality(name):
    case = case_of(name, T=11, B=1)
    before, _ = testing.call(case)
    for t in case.tensors.values():
        t[:, 6:] = t[:, 6:] * 0.5
    after, _ = testing.call(case)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-10, atol=1e-11)
    assert not torch.allclose(before[:, 6:], after[:, 6:])
