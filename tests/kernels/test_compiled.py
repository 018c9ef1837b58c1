"""path={kind: dual, compile: true}: whole mini-batches through torch.compile, traced here and run by torch's own operators."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import ttr
from ttr import testing
from ttr.kernels.torch import dual

SPEC = ttr.spec({"regressor": {"kind": "mlp", "depth": 1}, "optimizer": {"kind": "sgd", "mini_batch": 2}, "objective": "l2"})
COMPILED = {"kind": "dual", "compile": True}


@pytest.fixture(autouse=True)
def fresh():
    dual.compiled.cache_clear()
    yield
    dual.compiled.cache_clear()


def case() -> testing.Inputs:
    """Two whole mini-batches and an open one."""
    return testing.random_inputs(SPEC, T=5, B=1, H=1, Hv=1, dk=4, dv=4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks, and hides its warning
def test_the_same_numbers():
    counters.clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        got = testing.evaluate(case(), COMPILED)
        testing.evaluate(case(), COMPILED)
    testing.assert_close(got, testing.evaluate(case(), "dual"), 1e-12, "compiled")
    assert counters["stats"]["unique_graphs"] == 1, "one for both mini-batches of both calls"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_nothing_wants_a_gradient_that_did_not():
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        o, state = testing.call(case(), COMPILED)
    assert not o.requires_grad and not state.weights["W1"].requires_grad


@pytest.mark.parametrize(("compile", "mini_batch", "why"), [("yes", 2, "expected true or false"), (True, "sequence", "never has")])
def test_what_compile_means(compile, mini_batch, why):
    spec = ttr.spec(SPEC, optimizer={"mini_batch": mini_batch})
    with pytest.raises(ValueError, match=why):
        testing.call(testing.random_inputs(spec, T=3, B=1, H=1, Hv=1, dk=4, dv=4), {"kind": "dual", "compile": compile})


def test_what_cannot_be_compiled_says_so_and_runs():
    def refuse(*args, **kwargs):
        raise torch._dynamo.exc.Unsupported("no such thing")

    with mock.patch.object(torch, "compile", lambda fn, **how: refuse), pytest.warns(UserWarning, match="runs eagerly: no such thing"):
        got = testing.evaluate(case(), COMPILED)
    testing.assert_close(got, testing.evaluate(case(), "dual"), 1e-12, "eager")


def test_a_layer_takes_a_path_with_options():
    layer = ttr.Mixer(16, "ttt_mlp", n_heads=1, head_dim=16, path={"kind": "dual", "compile": False})
    assert "path=dual" in repr(layer)
    with pytest.raises(ValueError, match="option='compiled' is not known"):
        ttr.Mixer(16, "ttt_mlp", n_heads=1, head_dim=16, path={"kind": "dual", "compiled": True})(torch.randn(1, 4, 16))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_fresh_memory_is_traced_whole():
    """Where its mini-batches begin is known without looking at the state."""
    spec = ttr.spec({"regressor": "linear", "optimizer": {"kind": "sgd", "mini_batch": 4, "step": 0.5}})
    q, k, v = torch.randn(3, 1, 6, 1, 4)

    def call(q, k, v):
        return ttr.regress(q, k, v, spec, path="dual")[0]

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v))
