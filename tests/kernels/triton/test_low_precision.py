"""The reference behind the tolerances of test_gpu.py, on the CPU."""

import pytest
import torch

from . import low_precision
from .direct import in_dtype
from .mechanisms import definition, inputs


@pytest.mark.parametrize("name", ["mamba", "gated delta", "coupled, read before"])
@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float32, 1e-9, 2e-6), (torch.float16, 5e-5, 1e-3), (torch.bfloat16, 5e-4, 8e-3)], ids=str
)
def test_loses_what_the_dtype_loses(name, dtype, least, most):
    case = in_dtype(inputs(name, 130, H=1, Hv=2, dk=32, dv=32, correlation=0.2), dtype)
    exact = definition(case)
    for what, (rms, _) in low_precision.losses(low_precision.evaluate(case), exact, low_precision.parts(case, exact)).items():
        assert least < rms < most, f"{what} loses {rms:.1e}"


def test_every_product_is_seen_in_forward_and_in_backward():
    """Without one ulp of rounding the mode changes nothing; with it, the gradients of a plain product are those of rounded operands."""
    a, b = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    with low_precision.RoundedProducts(torch.bfloat16) as mode:
        (a @ b).sum().backward()
    assert mode.seen == 3
    assert torch.equal(a.grad, torch.ones(8, 8) @ b.detach().bfloat16().float().T)
    with low_precision.RoundedProducts(torch.float32):
        exact = a @ b
    assert torch.equal(exact, a @ b)
    for product in (
        lambda: torch.einsum("ij,jk->ik", a, b),
        lambda: torch.baddbmm(a[None], a[None], b[None]),
        lambda: torch.addmm(a, a, b),
    ):
        with low_precision.RoundedProducts(torch.bfloat16) as mode:
            product()
        assert mode.seen == 1
