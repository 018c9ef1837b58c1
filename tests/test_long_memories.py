"""Nonlinear memories at their first values, over sequences that are long beside what their gates and steps reach."""

import pytest
import torch

import ttr


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp", "titans", "yaad", "moneta", "memora"])
def test_a_fresh_layer_does_not_answer_to_rounding(name):
    """What changes in the input by a millionth changes in the output by little more, to the last of 2048 tokens.

    A memory that has forgotten its first weights by then multiplies it by 10^5 (titans with 1 - alpha at 0.98).
    """
    torch.manual_seed(0)
    mixer = ttr.Mixer(64, name, n_heads=1)
    x = torch.randn(1, 2048, 64)
    with torch.no_grad():
        y, other = (mixer(x + change)[:, -512:] for change in (0.0, 1e-6 * torch.randn_like(x)))
    assert (other - y).norm() < 3e-5 * y.norm()
