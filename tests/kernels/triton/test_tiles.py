"""Device functions on their own, in the interpreter or on the GPU."""

import pytest
import torch
import triton
import triton.language as tl

from ttr.kernels.triton.tiles import remembered


@triton.jit
def remembered_kernel(bounds, felt, left, slot, chunks, HV: tl.constexpr, BACK: tl.constexpr):
    head = tl.program_id(0)
    count, rest = remembered(bounds, head, slot, chunks, HV, BACK)
    tl.store(felt + head, count)
    tl.store(left + head, rest)


def counted(bounds: list[float]) -> int:
    """The farthest chunk of which 2^-126 or more is left, the first counted being the nearest."""
    felt, left = 0, 0.0
    for i, bound in enumerate(bounds):
        felt = felt if left <= -126 else i + 1
        left += bound
    return felt


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("chunks", [0, 1, 127, 128, 129, 300])
def test_remembered(back, chunks, device):
    """Heads that forget fast, slowly, not at all, and one that grows again what a gate had taken."""
    slot, heads = 5, 4
    bounds = torch.rand(slot + chunks + 3, heads) * torch.tensor([-20.0, -0.6, 0.0, -3.0])
    bounds[slot + chunks // 3 : slot + 2 * chunks // 3, 3] *= -1
    felt, left = torch.full((heads,), -1, dtype=torch.int32, device=device), torch.full((heads,), torch.nan, device=device)
    remembered_kernel[(heads,)](bounds.to(device), felt, left, slot, chunks, heads, back)
    own = bounds[slot : slot + chunks]
    assert torch.allclose(left.cpu(), own.sum(0), rtol=1e-5, atol=1e-4)
    assert felt.tolist() == [counted((own if back else own.flip(0))[:, h].tolist()) for h in range(heads)]
