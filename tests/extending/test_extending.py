"""A new optimizer and a new gate, one file each, get everything that the built-in ones have."""

import pytest
import torch

import ttr
from tests.extending import leaky_reset, two_timescales  # noqa: F401  (they register themselves)
from ttr import testing

NEW = {"optimizer": "two_timescales", "gate": "leaky_reset"}


def test_config_round_trip():
    spec = ttr.spec({**NEW, "optimizer": {"kind": "two_timescales", "mix": 0.5, "follow": {"bias": -1.0}}})
    assert ttr.spec(spec.to_dict()) == spec and ttr.spec(spec.to_dict(full=True)).hash == spec.hash
    assert spec.optimizer.mix == 0.5 and spec.optimizer.follow.bias == -1.0
    with pytest.raises(ttr.SpecError, match=r"optimizer\.mixx=1.*Did you mean 'mix'"):
        ttr.spec({"optimizer": {"kind": "two_timescales", "mixx": 1}})


@pytest.mark.parametrize("gate", ["none", "scalar", "vector", "leaky_reset"])
@pytest.mark.parametrize("order", ["first", "coupled"])
def test_every_path_is_the_definition(gate, order):
    """Being linear it runs chunkwise; probed, not written twice."""
    spec = ttr.spec({**NEW, "gate": {"kind": gate, "order": order}})
    assert ttr.select_path(spec)[0] == "chunk"
    testing.assert_conforms(spec, T=21, chunk_sizes=(4, 16))
    testing.assert_conforms(ttr.spec({**NEW, "optimizer": {"kind": "two_timescales", "steps": 2, "step_rule": "implicit"}}), T=9)


def test_it_trains_an_mlp_memory_too():
    spec = ttr.spec({"regressor": {"kind": "mlp", "expansion": 2}, "optimizer": {"kind": "two_timescales", "mini_batch": 4}})
    assert ttr.select_path(spec)[0] == "dual"
    testing.assert_conforms(spec, T=10, dk=3)


def test_layer_and_decoding():
    torch.manual_seed(0)
    mixer = ttr.Mixer(32, NEW, head_dim=16).double()
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    y = mixer(x)
    y.sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    head, state = mixer.prefill(x[:, :7])
    tail = []
    for t in range(7, 12):
        y_t, state = mixer.step(x[:, t], state)
        tail.append(y_t)
    torch.testing.assert_close(torch.cat([head, torch.stack(tail, 1)], 1), y, rtol=1e-9, atol=1e-9)


def test_explain():
    text = str(ttr.explain(NEW, d_model=64))
    for word in ("two_timescales", "leaky_reset", "chunk", "pull", "follow"):
        assert word in text, text
