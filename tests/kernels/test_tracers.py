"""Tracers that hold no numbers: nobody asks them for any, and what they trace, or compile, gives the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ttr
from ttr import testing

DECLARATIONS = {
    "gated_deltanet": "gated_deltanet",
    "mesanet": "mesanet",
    "exact, no gate": ttr.spec("mesanet", optimizer="cholesky", gate="none"),
}


def problem(name):
    case = testing.random_inputs(DECLARATIONS[name], T=9, B=1, H=1, Hv=2, dk=4, dv=4, extreme=False)
    names = list(case.tensors)

    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return ttr.regress(given.pop("q"), given.pop("k"), given.pop("v"), case.spec, params=case.params, path="chunk", **given)[0]

    return call, list(case.tensors.values())


@pytest.mark.parametrize("name", DECLARATIONS)
def test_make_fx(name):
    call, tensors = problem(name)
    other = [x.flip(1) for x in tensors]
    torch.testing.assert_close(make_fx(call)(*tensors)(*other), call(*other))


@pytest.mark.parametrize("name", DECLARATIONS)
def test_fake_tensors(name):
    call, tensors = problem(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(*map(mode.from_tensor, tensors)).shape == (1, 9, 2, 4)


def test_gradients_of_compiled_code_that_pads():
    """A whole chunk's worth of events out of 11 tokens, in code that Inductor made."""
    case = testing.random_inputs(ttr.spec("deltanet"), T=11, B=2, H=2, Hv=2, dk=16, dv=16, extreme=False).to(torch.float32)
    leaves = {name: x.requires_grad_() for name, x in case.tensors.items()}

    def call(x):
        return ttr.regress(x["q"], x["k"], x["v"], case.spec, step=x["step"], path="chunk")[0]

    torch._dynamo.reset()
    with torch._inductor.config.patch("cpp.threads", 2):  # for which it sums in other ways than for one
        got, expected = (torch.autograd.grad(f(leaves).square().sum(), [*leaves.values()]) for f in (torch.compile(call), call))
    torch.testing.assert_close(got, expected)
