"""bf16 operands in the dual form: which products take them, what it costs, and what stays float32."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ttr
from ttr import testing
from ttr.kernels.torch import dual

SIZE = 16  # heads, and the least side of a large product


class Products(TorchDispatchMode):
    """The dtypes of matmuls none of whose sides is shorter than SIZE."""

    def __init__(self):
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if min(*a.shape[-2:], b.shape[-1]) >= SIZE:
                self.dtypes.append(a.dtype)
        return func(*args, **(kwargs or {}))


def case(name: str, T: int = 104, mini_batch: int = 48) -> testing.Inputs:
    """Titans' steps so small that its momentum does not amplify what is rounded many times over."""
    spec = ttr.spec(name, **{"optimizer.mini_batch": mini_batch})
    given = testing.random_inputs(spec, B=1, T=T, dk=SIZE, dv=SIZE, correlation=0.2, extreme=False)
    return replace(given, tensors={n: 0.02 * x if (name, n) == ("titans", "step") else x for n, x in given.tensors.items()})


@pytest.mark.parametrize(
    ("name", "values", "states", "gradients"),
    [
        ("ttt_mlp", 2**-7, 2**-8, 2**-5),
        ("titans", 2**-7, 2**-6, 2**-4),
        ("omeganet", 2**-7, 2**-7, 2**-6),
        ("lact", 2**-5, 2**-3, 2**-2),  # Newton-Schulz lifts what is rounded with the small directions of a gradient
    ],
)
def test_errors_are_bf16s(name, values, states, gradients):
    given = case(name).to(torch.bfloat16)
    exact = testing.evaluate(given.to(torch.float64), "definition")
    single = testing.errors(testing.evaluate(given.to(torch.float32), "dual"), exact)
    allowed = {n: gradients if n.startswith("d ") else values if n == "o" else states for n in exact}
    testing.assert_close(testing.evaluate(given, "dual"), exact, allowed, name)
    assert max(single.values()) < 5e-5, "float32 inputs mean float32 operands"


@pytest.mark.parametrize("name", ["ttt_mlp", "titans", "lact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_large_products_take_bf16_where_the_call_is_bf16(name, dtype):
    """Forward and backward, and those of Muon; fp16 is computed in float32."""
    with Products() as seen:
        testing.evaluate(case(name, T=64, mini_batch=SIZE).to(dtype), "dual")
    expected = {torch.float16: torch.float32}.get(dtype, dtype)
    assert len(seen.dtypes) > 50 and set(seen.dtypes) == {expected}


def test_one_wide_input_keeps_float32():
    given = case("titans", T=32).to(torch.bfloat16)
    given = replace(given, tensors={**given.tensors, "v": given.tensors["v"].float()})
    with Products() as seen:
        testing.call(given, "dual")
    assert set(seen.dtypes) == {torch.float32}


def test_few_tokens_are_multiplied_as_they_are():
    """Rounding a matrix for one token's sake would cost more than the product."""
    given = case("titans", T=32).to(torch.bfloat16)
    for tokens, operands in ((1, None), (dual.FEW - 1, None), (dual.FEW, torch.bfloat16)):
        with mock.patch.object(dual, "product", wraps=dual.product) as product:
            testing.call(given.tokens(0, tokens), "dual")
        assert {call.kwargs["operands"] for call in product.call_args_list} == {operands}


def test_states_add_up_in_float32():
    """Updates of 2^-11 of a weight each, all of which a sum in bf16 would lose."""
    spec = ttr.spec(
        {
            "regressor": {"kind": "mlp", "depth": 1, "norm": "none", "residual": False},
            "optimizer": {"kind": "sgd", "step": 2.0**-15, "mini_batch": SIZE},
            "objective": "dot",
            "gate": "none",
        }
    )
    T = 40 * SIZE
    q, k, v = (torch.ones(1, T, 1, SIZE, dtype=torch.bfloat16) for _ in range(3))
    params = {"W1": torch.ones(1, SIZE, SIZE)}
    _, state = ttr.regress(q, k, v, spec, params=params, path="dual")
    torch.testing.assert_close(state.weights["W1"] - 1, torch.full((1, 1, SIZE, SIZE), 40 * 2.0**-11), rtol=2**-7, atol=0)


def test_second_derivatives_flow():
    """Of the outer gradient, through the inner one, against the definition's in float64."""
    given = case("ttt_mlp", T=32, mini_batch=SIZE).to(torch.bfloat16)

    def curvature(given: testing.Inputs, path: str) -> list[torch.Tensor]:
        x = {n: t.detach().clone().requires_grad_() for n, t in given.tensors.items()}
        o, _ = ttr.regress(**x, spec=given.spec, params=given.params, path=path)
        first = torch.autograd.grad(o.square().sum(), list(x.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(x.values())))

    for got, expected in zip(curvature(given, "dual"), curvature(given.to(torch.float64), "definition"), strict=True):
        assert testing.relative_error(got, expected) < 2**-4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks, and hides its warning
def test_compiled_mini_batches_take_the_same_operands():
    spec = ttr.spec({"regressor": {"kind": "mlp", "depth": 1}, "optimizer": {"kind": "sgd", "mini_batch": SIZE}, "objective": "l2"})
    given = testing.random_inputs(spec, T=SIZE + 1, B=1, H=1, Hv=1, dk=SIZE, dv=SIZE).to(torch.bfloat16)
    dual.compiled.cache_clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        got = testing.evaluate(given, {"kind": "dual", "compile": True})
    dual.compiled.cache_clear()
    eager = testing.evaluate(given, "dual")
    testing.assert_close(got, eager, 1e-6, "compiled")
    single = testing.evaluate(given.to(torch.float32), "dual")
    assert testing.relative_error(single["weights.W1"], eager["weights.W1"]) > 1e-4, "which float32 operands would not round"


def test_the_reason_says_so():
    assert "bf16 operands" in ttr.select_path("titans", dtype=torch.bfloat16)[1]
    assert "bf16" not in ttr.select_path("titans", dtype=torch.float16)[1]
