"""The launches of `short_conv`, forward and backward, of a batch and of a packed row that goes on, with short and long filters."""

import torch

from ttr.kernels.triton.short_conv.function import launch, short_conv_gradient_kernel, short_conv_kernel

from .recording import Named, recorded


def launches(everything: bool) -> Named:
    with recorded("cpu") as found:
        x = torch.empty(1, 512, 1024, dtype=torch.bfloat16)
        for K in (4, 8, 16):
            weight, history = torch.empty(1024, K), torch.empty(8, K - 1, 1024)
            for before, places in ((None, None), (history, torch.empty(512, dtype=torch.int64))):
                for given, silu in ((None, False), (None, True), (x, True)):
                    launch(short_conv_kernel, x, weight, before, places, places, given, x, silu=silu)
                launch(short_conv_gradient_kernel, x, weight, before, places, places, x, x, weight)
    for one in found:
        yield f"short conv {one[2]['K']}", one, True
