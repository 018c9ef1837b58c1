"""Bound kernels: what is launched directly is what was compiled for this dtype and device, without a GPU to launch on."""

from unittest import mock

import pytest
import torch

from ttr.kernels.triton.decode import run as decoding
from ttr.kernels.triton.decode.step import step_kernel

pytest.importorskip("triton")


class Compiled:
    """Stands for a compiled kernel: notes which it is, and what it was given."""

    function = packed_metadata = None

    def __init__(self, types: tuple, launched: list):
        self.types, self.launched = types, launched

    def run(self, x, y, z, stream, function, metadata, hook, enter, leave, *arguments):
        self.launched.append((self.types, types_of(arguments)))


def types_of(arguments: tuple) -> tuple:
    return tuple(x.dtype if isinstance(x, torch.Tensor) else None for x in arguments[:7])


@pytest.fixture
def launched(monkeypatch):
    """(dtypes it was compiled for, dtypes it was given) of every direct launch."""
    seen: list = []
    names = step_kernel.fn.arg_names

    class Runtime:
        arg_names = names

        def __getitem__(self, grid):
            return lambda *arguments, **constants: Compiled(types_of(arguments), seen)

    monkeypatch.setattr(step_kernel, "fn", Runtime())
    monkeypatch.setattr(step_kernel, "compiled", {})
    decoding._bound.cache_clear()
    with mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True):
        yield seen
    decoding._bound.cache_clear()


def step(dtype: torch.dtype, numbers: torch.dtype | None = None, T: int = 3) -> None:
    q, k, v = (torch.randn(2, T, 4, 64).to(dtype)[:, 0] for _ in range(3))
    given = None if numbers is None else torch.rand(2, 4).to(numbers)
    decoding.step_in_place(q, k, v, given, None, torch.zeros(2, 4, 64, 64), 0.5, -0.1, 1.0, 1e-6, 0.1, True, False, False, "plain")


def test_another_dtype_is_another_kernel(launched):
    for dtype, numbers in (
        (torch.bfloat16, None),
        (torch.float32, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ) * 3:
        step(dtype, numbers)
    assert len(launched) == 8, "the first call of each of the four compiles"
    assert all(compiled == given for compiled, given in launched)


def test_a_batch_stride_makes_no_other_kernel(launched):
    """q[:, t] of sequences of any length."""
    for T in (1, 2, 3, 100):
        step(torch.float16, T=T)
    assert len(launched) == 3


def test_what_does_not_lie_on_16_bytes_goes_through_triton(launched):
    wide = torch.randn(2, 4, 65)
    for _ in range(3):
        decoding.step_in_place(
            wide[..., 1:],
            wide[..., 1:],
            wide[..., 1:],
            None,
            None,
            torch.zeros(2, 4, 64, 64),
            0.5,
            -0.1,
            1.0,
            1e-6,
            0.1,
            True,
            False,
            False,
            "plain",
        )
    assert not launched
