"""Every preset is its published recurrence: `ttr.regress` against the transcriptions, in float64, on every path."""

from __future__ import annotations

import pytest
import torch
from preset_cases import CASES, Draw, Inputs, State
from torch import Tensor

import ttr
from ttr import testing

TOLERANCE = 1e-9
COLUMNS = [(name, path) for name, case in CASES.items() for path in dict.fromkeys(("auto", *case.paths, *testing.targets(case.spec)))]


def same(left: Tensor, right: Tensor, what: str) -> None:
    """Equal up to TOLERANCE of the right side's largest entry."""
    assert left.shape == right.shape, f"{what}: {tuple(left.shape)} instead of {tuple(right.shape)}"
    assert torch.isfinite(left).all(), f"{what} is not finite"
    error = (left - right).abs().max() / right.abs().max().clamp(min=1e-300)
    assert error < TOLERANCE, f"{what}: relative error {error:.1e}"


def named(state: ttr.State) -> State:
    """Weights by their name, slots by slot.weight."""
    slots = {f"{slot}.{name}": x for slot, tensors in state.slots.items() for name, x in tensors.items()}
    return {**state.weights, **slots}


def committed(spec: ttr.Spec, T: int) -> bool:
    """Whether the last mini-batch is full, so that the state holds what the last token read."""
    return T % getattr(spec.optimizer, "mini_batch", 1) == 0


def test_every_preset_has_a_case():
    assert {case.preset for case in CASES.values()} == set(ttr.presets())


@pytest.mark.parametrize("T", [1, 12, 70])
@pytest.mark.parametrize(("name", "path"), COLUMNS)
def test_preset_is_the_published_recurrence(name, path, T):
    """Output, and the state where the paper has one, with the declaration's own query scale."""
    case = CASES[name]
    x = case.draw(Draw(), case.spec, T)
    output, state = ttr.regress(**x, spec=case.spec, path=path)
    expected_output, expected_state = case.expect(case.spec, x)
    same(output, expected_output, "output")
    if committed(case.spec, T):
        for key, value in expected_state.items():
            same(case.seen(named(state))[key], value, f"state {key}")


@pytest.mark.parametrize("name", CASES)
def test_a_state_handed_on_continues_the_published_recurrence(name):
    """Two calls, the second from the first one's state, split inside a mini-batch where there are any."""
    case, T, split = CASES[name], 12, 5
    x = case.draw(Draw(), case.spec, T)
    expected, _ = case.expect(case.spec, x)

    def part(tokens: slice) -> Inputs:
        return {key: value if key == "params" else value[:, tokens] for key, value in x.items()}

    first, state = ttr.regress(**part(slice(None, split)), spec=case.spec)
    second, _ = ttr.regress(**part(slice(split, None)), spec=case.spec, initial_state=state)
    same(torch.cat([first, second], 1), expected, "output")


@pytest.mark.parametrize(("name", "path"), COLUMNS)
def test_gradients_are_the_published_recurrence_s(name, path):
    """Of a random functional of output and state, with respect to q, k, v, every signal and every learned constant."""
    case, T = CASES[name], 12
    x = case.draw(Draw(), case.spec, T)
    params = x.pop("params", {})
    leaves = {key: value.clone().requires_grad_() for key, value in {**x, **params}.items()}
    inputs = {key: leaves[key] for key in x}
    if params:
        inputs["params"] = {key: leaves[key] for key in params}
    with_state = committed(case.spec, T)

    def gradients(output: Tensor, state: State, keys: list[str]) -> dict[str, Tensor]:
        weigh = Draw()
        total = (output * weigh(*output.shape)).sum()
        for key in keys:
            total = total + (state[key] * weigh(*state[key].shape)).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    expected_output, expected_state = case.expect(case.spec, inputs)
    keys = sorted(expected_state) if with_state else []
    expected = gradients(expected_output, expected_state, keys)
    output, state = ttr.regress(**inputs, spec=case.spec, path=path)
    for key, value in gradients(output, case.seen(named(state)), keys).items():
        same(value, expected[key], f"gradient of {key}")
