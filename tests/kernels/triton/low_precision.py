"""What an ideal kernel in 16 bits would lose: the torch chunk path with the operands of every product rounded, sums in float32.

The tolerance of test_gpu.py is a multiple of this run's error against float64. It is an optimistic reference: the
triangular systems, the gates and all that is elementwise stay in float32, and the state between chunks is rounded only
where it enters a product. In float32 nothing is rounded: the reference is the chunk path itself.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttr import testing

aten = torch.ops.aten
# product -> which of its arguments are its operands
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
}


class RoundedProducts(TorchDispatchMode):
    """Rounds the operands of matrix products to `dtype` and back, forward and backward: autograd's products come by here, too."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.seen = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            self.seen += 1
            args = [x.to(self.dtype).to(x.dtype) if i in PRODUCTS[function] else x for i, x in enumerate(args)]
        return function(*args, **(kwargs or {}))


def evaluate(case: testing.Inputs) -> dict[str, torch.Tensor]:
    """`testing.evaluate` of a call whose q, k and v are of the dtype in question, as test_gpu.py makes them."""
    chunk = {"kind": "chunk", "chunk_size": 64}
    dtype = case.tensors["q"].dtype
    if dtype == torch.float32:
        return testing.evaluate(case, chunk)
    with RoundedProducts(dtype) as mode:
        out = testing.evaluate(case, chunk)
    assert mode.seen, "no product was rounded: torch does them by another op"
    return out


def losses(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """|got - exact| / |exact| by name, as root mean squares and as maxima; infinite where anything is not finite.

    parts: what a result is a difference of, whose size counts where it is larger than the result's.
    """
    if got.keys() != exact.keys():
        raise AssertionError(f"one side lacks {sorted(got.keys() ^ exact.keys())}")
    return {name: _loss(got[name], exact[name], parts.get(name, exact[name])) for name in exact}


def parts(case: testing.Inputs, exact: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """d log_decay gathers q . dq: it is zero where a gate forgets all, but nothing rounds to zero on the way."""
    return {"d log_decay": (case.tensors["q"] * exact["d q"]).sum(-1)} if "d log_decay" in exact else {}


def _loss(got: torch.Tensor, exact: torch.Tensor, part: torch.Tensor) -> tuple[float, float]:
    got, exact = got.double(), exact.double()
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return float("inf"), float("inf")
    if not got.numel():
        return 0.0, 0.0
    off = got - exact
    rms, *scales = (float(x.square().mean().sqrt()) for x in (off, exact, part))
    peak, *largest = (float(x.abs().max()) for x in (off, exact, part))
    return rms / max(*scales, 1e-6), peak / max(*largest, 1e-6)
