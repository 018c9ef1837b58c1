"""The memory between two calls: moved, copied, reordered, saved and read back, and nothing else's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import ttr
from ttr import testing

SPECS = {
    "linear": "gated_deltanet",
    "slots": "momentum_deltanet",
    "normalizer": "linear_attention",
    "open mini-batch": {"optimizer": {"kind": "momentum", "mini_batch": 4}},
    "accumulated": {"optimizer": {"kind": "muon", "mini_batch": 4, "accumulate": True}, "read": "before"},
    "mlp": "titans",
    "least squares": "mesanet",
    "recursive": "mesa",
    "cache": "softmax_window",
}


def run(name: str, T: int = 6) -> tuple[testing.Inputs, ttr.State]:
    case = testing.random_inputs(SPECS[name], T=T, B=3, dk=4, dv=4, extreme=False)
    return case, testing.call(case)[1]


def leaves(state: ttr.State) -> list[Tensor]:
    return pytree.tree_leaves(state)


def equal(left: ttr.State, right: ttr.State) -> None:
    assert left.spec_hash == right.spec_hash
    a, b = (testing.flatten({k: v for k, v in s.to_dict().items() if k != "spec_hash"}) for s in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(params=SPECS)
def name(request) -> str:
    return request.param


def test_what_it_holds(name):
    case, state = run(name)
    assert state.spec_hash == case.spec.hash
    assert all(t.shape[0] == 3 for t in leaves(state))
    assert state.nbytes == sum(t.numel() * t.element_size() for t in leaves(state)) > 0
    optimizer = case.spec.optimizer
    assert tuple(state.slots) == getattr(optimizer, "slots", ())
    assert ("position" in state.mini_batch) == (case.spec.mini_batch != 1)


def test_detach_and_clone(name):
    case = testing.random_inputs(SPECS[name], T=6, B=3, dk=4, dv=4, extreme=False)
    live = testing.replace(case, tensors={n: t.requires_grad_() for n, t in case.tensors.items()})
    _, state = testing.call(live)
    assert any(t.requires_grad for t in leaves(state))
    assert not any(t.requires_grad for t in leaves(state.detach()))
    copied = state.clone()
    equal(copied, state)
    assert any(t.requires_grad for t in leaves(copied)), "a clone stays on the graph"
    for mine, its in zip(leaves(copied.detach()), leaves(state), strict=True):
        assert mine.numel() == 0 or mine.data_ptr() != its.data_ptr()


def test_to_moves_and_keeps_dtypes(name):
    _, state = run(name)
    equal(state.to("cpu"), state)
    moved = state.to("meta")
    assert all(t.device.type == "meta" for t in leaves(moved))
    assert [t.dtype for t in leaves(moved)] == [t.dtype for t in leaves(state)]


def test_index_select_reorders_sequences(name):
    """Of a batch in another order, some of them twice: what continuing with those sequences gives."""
    case, state = run(name)
    index = torch.tensor([2, 0, 0, 1])
    chosen = state.index_select(index)
    assert all(t.shape[0] == 4 for t in leaves(chosen))
    again = testing.replace(case, tensors={n: t[index] if t.shape[0] == 3 else t for n, t in case.tensors.items()})
    if isinstance(case.initial_state, Tensor):
        again = testing.replace(again, initial_state=case.initial_state[index])
    o, expected = testing.call(testing.replace(again, initial_state=testing.call(again)[1]))
    o2, got = testing.call(testing.replace(again, initial_state=chosen))
    torch.testing.assert_close(o2, o, rtol=1e-9, atol=1e-9)
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_saved_without_classes_and_read_back(name):
    case, state = run(name)
    buffer = io.BytesIO()
    torch.save(state.detach().to_dict(), buffer)
    buffer.seek(0)
    again = ttr.State.from_dict(torch.load(buffer, weights_only=True), case.spec)
    equal(again, state)
    assert torch.equal(
        testing.call(testing.replace(case, initial_state=again))[0], testing.call(testing.replace(case, initial_state=state))[0]
    )
    equal(ttr.State.from_dict(state.to_dict(), case.spec.to_dict()), state)


def test_from_dict_refuses_another_declaration(name):
    _, state = run(name)
    other = ttr.spec("gla")
    with pytest.raises(ValueError) as refused:
        ttr.State.from_dict(state.to_dict(), other)
    for part in ("state.spec_hash", state.spec_hash, other.hash, "another declaration"):
        assert part in str(refused.value)
    data = {k: v for k, v in state.to_dict().items() if k != "slots"}
    with pytest.raises(
        ValueError, match=r"state is missing \['slots'\]; expected the keys \['weights', 'slots', 'mini_batch', 'spec_hash'\]"
    ):
        ttr.State.from_dict(data, other)


def test_the_name_of_a_declaration_does_not_count():
    case, state = run("linear")
    renamed = ttr.spec({**case.spec.to_dict(), "name": "other"})
    equal(ttr.State.from_dict(state.to_dict(), renamed), state)


def test_it_is_a_pytree(name):
    _, state = run(name)
    flat, structure = pytree.tree_flatten(state)
    assert all(isinstance(t, Tensor) for t in flat)
    equal(pytree.tree_unflatten(flat, structure), state)
    doubled = pytree.tree_map(lambda t: t + t, state)
    assert isinstance(doubled, ttr.State) and doubled.spec_hash == state.spec_hash
    assert torch.equal(leaves(doubled)[0], 2 * flat[0])
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    equal(copy.deepcopy(state.detach()), state)


def test_its_size_is_constant_where_the_memory_is(name):
    sizes = [run(name, T)[1].nbytes for T in (5, 13)]
    assert sizes[0] == sizes[1] or name == "cache"
