"""Tracers that hold no numbers: nobody asks them for any, and what they trace gives the same."""

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
