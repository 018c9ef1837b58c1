"""The launches of `unit_norm`, forward and backward, of heads of 128 and of the widest row."""

import torch

from ttr.kernels.triton.unit_norm.function import launch, unit_norm_gradient_kernel, unit_norm_kernel

from .recording import Named, recorded


def launches(everything: bool) -> Named:
    with recorded("cpu") as found:
        for D in (128, 4096):
            x = torch.empty(1024, D, dtype=torch.bfloat16)
            rates = torch.empty(1024, 1)
            launch(unit_norm_kernel, x, x, rates, eps=1e-6)
            launch(unit_norm_gradient_kernel, x, rates, x, x)
    for one in found:
        yield "unit norm", one, True
