"""The short convolution: the kernels, in the interpreter or on the GPU, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from ttr.kernels.short_conv import short_conv
from ttr.kernels.triton.short_conv.function import ShortConv
from ttr.stages.timeline import Packed, Timeline

# the numbers' own rounding, on results of order one; float32's sums too
BOUNDS = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
LENGTHS = [5, 0, 1, 33, 2, 0, 60]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the rows above run in the interpreter")


def kernel(timeline, history, silu=False):
    """(x, weight) -> y, straight to the kernels."""
    places = timeline.places or (None, None)
    return lambda x, weight: ShortConv.apply(x, weight, history, *places, lambda x, w: timeline.weighed(x, w, history), silu)


def formula(timeline, history, silu):
    """(x, weight) -> y in torch's own operations."""
    return lambda x, weight: (F.silu if silu else torch.clone)(timeline.weighed(x, weight, history))


def given(T: int, D: int, K: int, device: str, dtype=torch.float32, packed=False, started=True):
    """A timeline, x, weight, history and an upstream gradient."""
    generator = torch.Generator().manual_seed(T + D + K)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if packed:
        bounds = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
        timeline, B, T = Packed(bounds), 1, sum(LENGTHS)
    else:
        timeline, B = Timeline(2), 2
    history = normal(timeline.n_sequences, K - 1, D) if started else None
    return timeline, normal(B, T, D), normal(D, K) / K, history, normal(B, T, D)


def check(timeline, x, weight, history, dy, function=None, silu=False) -> None:
    function = function or kernel(timeline, history, silu)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, expected = function(*leaves), formula(timeline, None if history is None else history.double(), silu)(*exact)
    bound = BOUNDS[x.dtype]
    assert y.dtype == x.dtype and (y - expected).abs().max() <= bound * expected.abs().max()
    for got, right in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert got.dtype == x.dtype and (got - right).abs().max() <= bound * right.abs().max()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("T", "D", "K"), [(1, 5, 4), (2, 16, 4), (33, 24, 3), (300, 8, 2), (40, 130, 5), (70, 8, 9), (70, 8, 64)])
def test_value_and_gradient(T, D, K, started, silu, device):
    check(*given(T, D, K, device, started=started), silu=silu)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("K", [4, 9])
def test_packed(K, started, silu, device):
    check(*given(0, 24, K, device, packed=True, started=started), silu=silu)


def test_what_no_output_reads_may_be_infinite(device):
    """A sequence's last token meets the newest weight alone."""
    timeline, x, weight, _, dy = given(9, 8, 4, device, started=False)
    x[:, -1] = float("inf")
    weight.requires_grad_()
    dy = dy.abs()  # an infinite sum, not one of infinities of both signs
    (got,) = torch.autograd.grad(kernel(timeline, None)(x, weight), weight, dy)
    (expected,) = torch.autograd.grad(timeline.weighed(x, weight, None), weight, dy)
    assert torch.isfinite(got[:, :-1]).all() and torch.equal(got[:, -1], expected[:, -1])
    torch.testing.assert_close(got[:, :-1], expected[:, :-1])


def test_nothing_passes_from_one_sequence_to_another(device):
    timeline, x, weight, history, _ = given(0, 8, 4, device, packed=True)
    x[:, 6:39] = float("nan")  # the sequence of 33 tokens
    y = kernel(timeline, history)(x, weight)
    assert torch.isfinite(y[:, :6]).all() and torch.isfinite(y[:, 39:]).all()


@pytest.mark.parametrize("silu", [False, True])
def test_the_input_alone_is_kept(silu, device):
    timeline, x, weight, _, _ = given(9, 8, 4, device, started=False)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()), lambda _: None):
        kernel(timeline, None, silu)(x.requires_grad_(), weight)
    assert kept == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("silu", [False, True])
def test_the_second_derivative_is_the_formulas(silu, device):
    timeline, x, weight, history, _ = given(9, 8, 4, device)

    def twice(function):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(twice(kernel(timeline, history, silu)), twice(formula(timeline, history, silu)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", ["twice", "made of the weight"])
def test_a_first_gradient_that_can_be_differentiated(tied, device):
    """Where x is made of the weight, its own gradient goes its own way, once."""
    timeline, x, weight, history, _ = given(9, 8, 4, device)
    weight.requires_grad_()

    def gradient(function, again):
        y = function(function(x, weight), weight) if tied == "twice" else function(x * weight.sum(), weight)
        return torch.autograd.grad(y.square().sum(), weight, create_graph=again)[0]

    expected = gradient(lambda x, w: timeline.weighed(x, w, history), False)
    for again in (False, True):
        torch.testing.assert_close(gradient(kernel(timeline, history), again), expected, rtol=1e-4, atol=1e-5)


def test_one_dtype_however_it_is_called():
    """Under autocast as a convolution has it: eager or packed, with a history in another dtype or without one."""
    for packed in (False, True):
        timeline, x, weight, history, _ = given(9, 8, 4, "cpu", packed=packed)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = timeline.convolve(x, weight, history)
            compiled = torch.compile(lambda x, t=timeline, w=weight, h=history: t.convolve(x, w, h)[0], fullgraph=True, backend="eager")
            assert y.dtype == compiled(x).dtype == torch.bfloat16
        assert timeline.convolve(x, weight, history)[0].dtype == torch.float32


def test_batched_gradients_are_the_formulas(device):
    """is_grads_batched runs backward under vmap, on tensors that no kernel can be given."""
    timeline, x, weight, history, _ = given(9, 8, 4, device)
    x.requires_grad_()
    upstream = torch.randn(3, *x.shape, device=device)
    (batched,) = torch.autograd.grad(kernel(timeline, history)(x, weight), x, upstream, is_grads_batched=True)
    each = torch.stack([torch.autograd.grad(kernel(timeline, history)(x, weight), x, dy)[0] for dy in upstream])
    torch.testing.assert_close(batched, each, rtol=1e-5, atol=1e-5)


@on_a_gpu
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_dtype_on_a_gpu(packed, dtype, silu):
    timeline, x, weight, history, dy = given(2000, 1024, 4, "cuda", dtype, packed)
    check(timeline, x, weight, history, dy, lambda x, weight: timeline.convolve(x, weight, history, silu)[0], silu)


@on_a_gpu
def test_eager_calls_on_a_gpu_take_the_kernel_and_others_the_formula():
    timeline, x, weight, history, _ = given(9, 8, 4, "cuda")
    x.requires_grad_()

    def name(x, weight, history):
        return type(short_conv(x, weight, history, lambda x, w: timeline.weighed(x, w, history)).grad_fn).__name__

    assert "ShortConv" in name(x, weight, history)
    assert "ShortConv" not in name(x.double(), weight.double(), history.double())
    assert "ShortConv" not in name(x, weight, history.requires_grad_())
    compiled = torch.compile(lambda x: timeline.convolve(x, weight, history)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), timeline.convolve(x, weight, history)[0])
