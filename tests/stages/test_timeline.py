"""Looking back over time: packed rows restart at every sequence and pick up what came before."""

from __future__ import annotations

import torch

from ttr.stages import Packed, Timeline, pack, unpack

LENGTHS = [5, 1, 0, 9, 2]
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def test_packed_equals_each_sequence_alone():
    torch.manual_seed(0)
    x, history, weight = torch.randn(1, 17, 3), torch.randn(5, 3, 3), torch.randn(3, 4)
    packed = Packed(CU)
    lags, kept = packed.lags(x, 3, history)
    y, kept_too = packed.convolve(x, weight, history)
    position, after = packed.position(x, torch.arange(5))
    assert torch.equal(kept, kept_too)
    for n, (a, b) in enumerate(zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True)):
        alone, own = Timeline(1), x[:, a:b]
        expected, expected_kept = alone.lags(own, 3, history[n : n + 1])
        for lag, want in zip(lags, expected, strict=True):
            assert torch.equal(lag[:, a:b], want)
        assert torch.equal(kept[n : n + 1], expected_kept)
        if b > a:
            assert torch.allclose(y[:, a:b], alone.convolve(own, weight, history[n : n + 1])[0], atol=1e-6)
        assert torch.equal(position[0, a:b], n + torch.arange(b - a)) and after[n] == n + b - a


def test_no_history_is_zeros():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 17, 3), torch.randn(3, 4)
    for timeline, n in ((Timeline(1), 1), (Packed(CU), 5)):
        assert torch.equal(timeline.convolve(x, weight, None)[0], timeline.convolve(x, weight, torch.zeros(n, 3, 3))[0])
        assert torch.equal(timeline.lags(x, 1, None)[0][1], timeline.lags(x, 1, torch.zeros(n, 1, 3))[0][1])


def test_what_is_kept_does_not_hold_the_input_alive():
    _, kept = Timeline(2).convolve(torch.randn(2, 100, 3), torch.randn(3, 4), None)
    assert kept.untyped_storage().nbytes() == 2 * 3 * 3 * 4


def test_pack_and_unpack():
    x = torch.arange(2 * 5 * 1.0).view(2, 5, 1)
    mask = torch.tensor([[False, True, False, True, True], [True, False, False, False, False]])
    packed, cu = pack(x, mask)
    assert packed.flatten().tolist() == [1, 3, 4, 5] and cu.tolist() == [0, 3, 4]
    assert torch.equal(unpack(packed, mask), x * mask[..., None])
