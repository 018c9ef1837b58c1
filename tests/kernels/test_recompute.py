"""Running a loop again in backward: the same derivatives, of any order, without the graph."""

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.torch import dual
from ttr.kernels.torch.recompute import recomputed

# a position factor and a shared key, momentum and decay, one summed step a mini-batch
DECLARATIONS = {
    "ttt_mlp": ttr.spec("ttt_mlp", **{"optimizer.mini_batch": 4}),
    "titans": ttr.spec("titans", **{"optimizer.mini_batch": 4}),
    "summed": ttr.spec(
        {"regressor": "mlp", "optimizer": {"kind": "delta", "step": "sigmoid", "accumulate": True, "mini_batch": 4}, "read": "before"}
    ),
}


def case(name: str, T: int) -> testing.Inputs:
    return testing.random_inputs(DECLARATIONS[name], T=T, B=2, H=1, Hv=2, dk=4, dv=4).to(torch.float64)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_groups_change_nothing(name, monkeypatch):
    """Results and gradients, those of the initial state among them, with a graph kept and with groups of five and of two."""
    given = case(name, 23)
    monkeypatch.setattr(dual, "KEPT", 100)
    kept = testing.evaluate(given, "dual")
    monkeypatch.setattr(dual, "KEPT", 1)
    again = testing.evaluate(given, "dual")
    assert kept.keys() == again.keys() and any(n.startswith("d ") for n in kept)
    for what in kept:
        torch.testing.assert_close(again[what], kept[what], rtol=1e-12, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("name", DECLARATIONS)
def test_second_derivatives_are_those_of_the_definition(name, monkeypatch):
    monkeypatch.setattr(dual, "KEPT", 1)
    given = case(name, 9)

    def curvature(path: str) -> list[torch.Tensor]:
        x = {n: t.detach().clone().requires_grad_() for n, t in given.tensors.items()}
        o, _ = ttr.regress(**x, spec=given.spec, params=given.params, path=path)
        first = torch.autograd.grad(o.square().sum(), list(x.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(x.values())))

    for x, y in zip(curvature("dual"), curvature("definition"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def nodes(root) -> int:
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_the_graph_grows_with_the_root_of_the_length():
    def graph(mini_batches: int) -> int:
        given = case("titans", 4 * mini_batches)
        x = {n: t.requires_grad_() for n, t in given.tensors.items()}
        return nodes(ttr.regress(**x, spec=given.spec, params=given.params, path="dual")[0].grad_fn)

    short, long = graph(16), graph(64)  # 4 groups, 8 groups
    assert long < 2.2 * short, (short, long)
    assert graph(8) > long, "a short sequence keeps its graph"


def test_what_backward_needs_is_asked_of_the_inputs_alone():
    """A result nobody differentiates, an input nobody reaches, integers, trees."""
    runs = []

    def fn(tree, count):
        runs.append(1)
        return {"y": tree["a"] * tree["a"].exp(), "unused": tree["a"] + 1, "count": count + 1}

    a, b, count = (
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.ones(2, requires_grad=True),
        torch.zeros((), dtype=torch.int64),
    )
    out = recomputed(fn, {"a": a, "b": b}, count)
    assert out["count"] == 1 and not out["count"].requires_grad and len(runs) == 1
    da, db = torch.autograd.grad(out["y"].sum(), [a, b], allow_unused=True)
    assert len(runs) == 2 and db is None
    torch.testing.assert_close(da, (1 + a).detach() * a.detach().exp())
    with torch.no_grad():
        recomputed(fn, {"a": a, "b": b}, count)
    assert len(runs) == 3, "without gradients it runs once"
    assert torch.autograd.gradgradcheck(lambda a: recomputed(fn, {"a": a, "b": b}, count)["y"], a)


def test_torch_func_sees_the_graph():
    f = lambda x: recomputed(lambda x: x.sin() * x, x).sum()  # noqa: E731
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(f)(x), x.cos() * x + x.sin())
    torch.testing.assert_close(torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], (x.cos() * x + x.sin()).sum())


def test_backward_under_autocast_runs_as_forward_did(monkeypatch):
    monkeypatch.setattr(dual, "KEPT", 1)
    given = case("ttt_mlp", 12).to(torch.float32)
    x = {n: t.requires_grad_() for n, t in given.tensors.items()}

    def gradients(enabled: bool) -> tuple[torch.Tensor, ...]:
        loss = ttr.regress(**x, spec=given.spec, params=given.params, path="dual")[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(loss, list(x.values()))

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)
