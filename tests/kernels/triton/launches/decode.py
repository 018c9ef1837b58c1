"""The launches of a decoding step: one sequence and many, with signals for every token and numbers for all."""

import torch

from ttr.kernels.triton.decode import run

from .recording import Named, recorded


def launches(everything: bool) -> Named:
    with recorded("cpu") as found:
        for B, rule, given in ((1, "plain", True), (64, "implicit", True), (8, "nlms", False)):
            q, state = torch.empty(B, 32, 128, dtype=torch.bfloat16), torch.empty(B, 32, 128, 128)
            numbers = torch.empty(B, 32) if given else None
            run.step_in_place(q, q, q, numbers, numbers, state, 1.0, 0.0, 1.0, 1e-6, 0.1, given, False, False, rule)
        for n, per, decay_per, rule in ((2, "head", "head", "plain"), (1, "key", "key", "plain"), (1, "value", "number", "implicit")):
            q, k = torch.empty(8, 32, 128, dtype=torch.bfloat16), torch.empty(8, n, 32, 128, dtype=torch.bfloat16)
            state, step = torch.empty(8, 32, 128, 128), torch.empty(8, n, 32, 128)
            decay = {"head": torch.empty(8, 32), "key": torch.empty(8, 32, 128), "number": None}[decay_per]
            p = k if per == "key" else None
            numbers = 1.0, 0.0, 1.0, 1.0, 1e-6, 0.1
            run.events_in_place(
                q, k, k, p, step[..., 0] if per == "head" else step, decay, state, *numbers, True, False, False, rule, per, decay_per
            )
    for launch in found:
        yield "decode", launch, True
