"""What a call of some kind launches and keeps, decided without running it."""

from unittest import mock

import pytest
import torch

from ttr.kernels.triton.buffers import Layout, Piece
from ttr.kernels.triton.configs import Config, Launch
from ttr.kernels.triton.scalar_gate.plan import Kind, Rule, backward_plan, forward_plan
from ttr.kernels.triton.shapes import Sizes

from . import direct

pytest.importorskip("triton")


def kind(N: int = 2, HV: int = 4, erase: bool = True, config: Config | None = None, **changed) -> Kind:
    sizes = Sizes(N=N, T=100, tokens=100 * N, H=2, HV=HV, dk=64, dv=64)
    made = Kind(sizes, torch.bfloat16, 0, 3, 3, True, False, Rule(erase, False, False), config or direct.config(), 2, 2)
    return made._replace(**changed)


def test_any_number_of_memories_fits_a_grid():
    """CUDA takes 65535 along every axis but the first."""
    many = kind(N=20_000, HV=16)
    forward, backward = forward_plan(many, True, True), backward_plan(many, True, True)
    for bound in (
        forward.local,
        forward.joined,
        forward.whole,
        backward.local,
        backward.joined,
        backward.whole,
        backward.readers,
        backward.keys,
    ):
        assert bound.grid[0] >= 320_000 and max(bound.grid[1:]) <= 65_535, bound.kernel


def test_states_are_kept_for_a_gradient_of_the_log_decay_alone():
    assert "checkpoints" in forward_plan(kind(), True, True).kept.places
    assert "checkpoints" not in forward_plan(kind(), True, False).kept.places
    assert "checkpoints" not in forward_plan(kind(log_decay=None), True, True).kept.places
    assert forward_plan(kind(), True, False).kept.places.keys() == backward_plan(kind(), False, False).kept.places.keys()


def test_a_plan_is_made_once_for_a_kind():
    config = direct.config()
    assert forward_plan(kind(config=config), True, True) is forward_plan(kind(config=config), True, True)
    assert forward_plan(kind(config=config, dtype=torch.float16), True, True) is not forward_plan(kind(config=config), True, True)


def test_arrays_of_a_buffer_lie_apart_and_where_launches_are_told():
    layout = Layout({"a": ((3, 5), torch.bfloat16), "b": ((0, 4), torch.float32), "c": ((7,), torch.float64)})
    buffer = layout.make(torch.empty(0)).fill_(0)
    views = layout.arrays(buffer)
    on_gpu = mock.Mock(is_cuda=True, data_ptr=buffer.data_ptr)
    for name, piece in layout.arrays(on_gpu).items():
        assert isinstance(piece, Piece) and piece.dtype == views[name].dtype
        assert piece.data_ptr() == views[name].data_ptr() or not views[name].numel()
    views["a"].fill_(1), views["c"].fill_(2)
    assert views["a"].eq(1).all() and views["c"].eq(2).all() and layout.places["c"][0] == 256 and layout.size == 512


@pytest.mark.parametrize(("readers", "keys"), [(16, 32), (32, 16), (64, 16)])
def test_readers_and_keys_may_have_tiles_of_their_own(readers, keys):
    """Each sums over its own tiles; buffers filled with NaN show what nobody wrote."""
    made = direct.config(readers=Launch(readers, 4, 1), keys=Launch(keys, 4, 1))
    backward = backward_plan(kind(config=made), False, True)
    assert (backward.reader_tiles, backward.writer_tiles) == (64 // readers, 64 // keys)
    assert (backward.decay_gradient.constants["READERS"], backward.decay_gradient.constants["WRITERS"]) == (64 // readers, 64 // keys)
