"""Unit keys: the kernels, in the interpreter or on the GPU, against the formula in float64."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ttr.kernels.triton.unit_norm.function import UnitNorm
from ttr.kernels.unit_norm import unit_norm

EPS = 1e-6
# the numbers' own rounding, on results of order one; float32's sums too
BOUNDS = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the rows above run in the interpreter")


def rows(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]  # lengths apart
    return x.to(device, dtype)


def kernels(x: torch.Tensor, eps: float) -> torch.Tensor:
    return UnitNorm.apply(x, eps)[0]


def check(x: torch.Tensor, function=kernels) -> None:
    """Value and gradient of x as it lies."""
    x = x.detach().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    y, exact = function(x, EPS), exact_x / (exact_x.square().sum(-1, keepdim=True) + EPS).sqrt()
    assert y.dtype == x.dtype and y.shape == x.shape
    assert (y - exact).abs().max() <= BOUNDS[x.dtype]
    (dx,), (exact_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, exact_x, dy.double())
    scale = exact_dx.abs().amax(-1, keepdim=True)
    assert dx.dtype == x.dtype and ((dx - exact_dx).abs() / scale).max() <= BOUNDS[x.dtype]


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 7, 24), (3, 1, 1), (300, 128), (2, 3, 1000)], ids=str)
def test_value_and_gradient(shape, device):
    check(rows(*shape, dtype=torch.float32, device=device))


def test_views_of_something_wider(device):
    x = rows(2, 6, 50, dtype=torch.float32, device=device)
    check(x[:, :, 1:25])
    check(x.transpose(0, 1)[..., :48])


def test_a_row_of_zeros_stays_zero(device):
    x = torch.zeros(3, 8, device=device, requires_grad=True)
    y = kernels(x, EPS)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and torch.allclose(x.grad, torch.full_like(x, EPS**-0.5))


def test_what_is_kept_is_there_anyway(device):
    """Beside a number a row."""
    x, kept = rows(4, 8, dtype=torch.float32, device=device).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}), lambda _: None):
        y = kernels(x, EPS)
    assert kept.pop(y.data_ptr()) == 32 and list(kept.values()) == [4]


def test_the_second_derivative_is_the_formulas(device):
    x = rows(4, 8, dtype=torch.float32, device=device).requires_grad_()

    def twice(function):
        (g,) = torch.autograd.grad(function(x, 0.5).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert torch.allclose(twice(kernels), twice(lambda x, eps: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)), rtol=1e-4)


def test_batched_gradients_are_the_formulas(device):
    """is_grads_batched runs backward under vmap, on tensors that no kernel can be given."""
    x = rows(4, 8, dtype=torch.float32, device=device).requires_grad_()
    given = torch.randn(3, 4, 8, device=device)
    (batched,) = torch.autograd.grad(kernels(x, EPS), x, given, is_grads_batched=True)
    each = torch.stack([torch.autograd.grad(kernels(x, EPS), x, dy)[0] for dy in given])
    assert torch.allclose(batched, each, rtol=1e-4, atol=1e-4 * float(each.abs().max()))


@on_a_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(8, 512, 16, 128), (2, 65, 3, 48)], ids=str)
def test_every_dtype_on_a_gpu(shape, dtype):
    check(rows(*shape, dtype=dtype, device="cuda"), unit_norm)


@on_a_gpu
def test_eager_calls_on_a_gpu_take_the_kernel_and_others_the_formula():
    x = torch.randn(4, 8, device="cuda", requires_grad=True)
    assert "UnitNorm" in type(unit_norm(x, EPS).grad_fn).__name__
    assert "UnitNorm" not in type(unit_norm(x.double(), EPS).grad_fn).__name__
    assert torch.allclose(torch.vmap(lambda row: unit_norm(row, EPS))(x), unit_norm(x, EPS))
    assert torch.allclose(make_fx(lambda x: unit_norm(x, EPS))(x)(2 * x), unit_norm(2 * x, EPS))
    assert torch.allclose(torch.compile(unit_norm, fullgraph=True, backend="aot_eager")(x, EPS), unit_norm(x, EPS))
