"""RMS norms: the kernels, in the interpreter or on the GPU, against the formula in float64."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ttr.kernels.rms_norm import rms_norm
from ttr.kernels.triton.rms_norm.function import RMSNorm

EPS = 1e-6
# the numbers' own rounding; float32's sums too
BOUNDS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the rows above run in the interpreter")


def given(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different lengths, and a weight of both signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]
    return x.to(device, dtype), torch.randn(shape[-1], generator=generator).to(device, dtype)


def kernels(x, weight, eps=EPS):
    return RMSNorm.apply(x, weight, eps)[0]


def formula(x, weight, eps=EPS):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def check(x, weight, function=kernels) -> None:
    """Value and gradients of x as it lies."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    y, expected = function(*leaves, EPS), formula(*exact)
    bound = BOUNDS[x.dtype]
    assert y.dtype == x.dtype and y.shape == x.shape and (y - expected).abs().max() <= bound * expected.abs().max()
    (dx, dw), (exact_dx, exact_dw) = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, exact, dy.double())
    assert dx.dtype == dw.dtype == x.dtype
    assert ((dx - exact_dx).abs() / exact_dx.abs().amax(-1, keepdim=True)).max() <= bound
    assert (dw - exact_dw).abs().max() <= bound * exact_dw.abs().max()


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 7, 24), (3, 1, 2), (300, 128), (2, 3, 1000), (9000, 8)], ids=str)
def test_value_and_gradients(shape, device):
    check(*given(*shape, device=device))


def test_views_of_something_wider(device):
    x, weight = given(2, 6, 50, device=device)
    check(x[:, :, 1:25], weight[3:27])
    check(x.transpose(0, 1)[..., :48], weight[::2].repeat(2)[:48])


def test_a_row_of_zeros_stays_zero(device):
    x, weight = torch.zeros(3, 8, device=device, requires_grad=True), torch.full((8,), 2.0, device=device, requires_grad=True)
    y = kernels(x, weight)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.allclose(x.grad, torch.full_like(x, 2 * EPS**-0.5))


def test_the_second_derivative_is_the_formulas(device):
    leaves = [t.requires_grad_() for t in given(4, 8, device=device)]

    def twice(function):
        first = torch.autograd.grad(function(*leaves, 0.5).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(twice(kernels), twice(formula), rtol=1e-4, atol=1e-4)


def test_batched_gradients_are_the_formulas(device):
    """is_grads_batched runs backward under vmap, on tensors that no kernel can be given."""
    leaves, dy = [t.requires_grad_() for t in given(4, 8, device=device)], torch.randn(3, 4, 8, device=device)
    batched = torch.autograd.grad(kernels(*leaves), leaves, dy, is_grads_batched=True)
    each = zip(*(torch.autograd.grad(kernels(*leaves), leaves, one) for one in dy), strict=True)
    for got, expected in zip(batched, each, strict=True):
        expected = torch.stack(expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@on_a_gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(8, 512, 16, 128), (2, 65, 3, 48), (4, 300, 16, 64)], ids=str)
def test_every_dtype_on_a_gpu(shape, dtype):
    check(*given(*shape, dtype=dtype, device="cuda"), rms_norm)


@on_a_gpu
def test_eager_calls_on_a_gpu_take_the_kernel_and_others_torchs():
    x, weight = (t.requires_grad_() for t in given(4, 8, device="cuda"))
    y = rms_norm(x, weight, EPS)
    assert "RMSNorm" in type(y.grad_fn).__name__
    assert type(rms_norm(x.double(), weight.double(), EPS).grad_fn).__name__ != type(y.grad_fn).__name__
    assert torch.allclose(torch.vmap(lambda row: rms_norm(row, weight, EPS))(x), y)
    assert torch.allclose(make_fx(lambda x: rms_norm(x, weight, EPS))(x)(2 * x), rms_norm(2 * x, weight, EPS))
    compiled = torch.compile(lambda x: rms_norm(x, weight, EPS), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), y)
