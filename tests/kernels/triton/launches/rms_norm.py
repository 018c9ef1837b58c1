"""The launches of `rms_norm`, forward and backward, of heads of 128 and of the widest row."""

import torch

from ttr.kernels.triton.rms_norm.function import RMSNorm

from .recording import Named, recorded


def launches(everything: bool) -> Named:
    with recorded("cpu") as found:
        for D in (128, 4096):
            x = torch.randn(1024, D).bfloat16().requires_grad_()
            RMSNorm.apply(x, torch.randn(D).bfloat16().requires_grad_(), 1e-6)[0].backward(torch.ones(1024, D).bfloat16())
    for one in found:
        yield "rms norm", one, True
