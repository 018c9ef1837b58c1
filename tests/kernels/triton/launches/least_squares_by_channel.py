"""The launches of least squares with a decay a channel, both ways: what `vector_gate` has not alike; of few heads, whose sequences are
cut, the scans."""

import torch

from ttr.kernels.triton.least_squares import plan as by_head
from ttr.kernels.triton.least_squares_by_channel import matrices, plan, run
from ttr.kernels.triton.vector_gate import config as vector_gate

from . import least_squares
from .recording import Launch, Named, recorded

SCANS, ALIKE = ("gram_kernel", "join_kernel", "gram_reverse_kernel"), ("prepare_kernel", "prepare_far_kernel")


def launches(everything: bool) -> Named:
    for sizes in least_squares.SIZES if everything else least_squares.SUBSET:
        for launch in called(*sizes):
            yield f"least squares by channel {' '.join(map(str, sizes))}", launch, True


def called(dk: int, itemsize: int) -> list[Launch]:
    wanted = []
    for B, T, H in ((8, 2048, 16), (1, 65536, 1)):
        with recorded() as found:
            dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
            q, decay, numbers, H_0 = torch.empty(B, T, H, dk, dtype=dtype), *(torch.empty(B, *n) for n in ((T, H, dk), (T, H), (H, dk, dk)))
            form = by_head.Form(1.0, 30, 0.0, False)
            p = plan.plan(plan.kind_of(q, q, decay, numbers, H_0, None, form.before)._replace(arch="sm_90"))
            for other in (None, q):
                given, _ = run.statistics(p, q, decay, numbers, H_0, None, other is not None)
                run.solve(p, given, q, q, decay, numbers, torch.empty(H, dk), other, None, form, 1.0)
            config = vector_gate.config_of(dtype, dk, dk, False, False)
            known = q, q, q, decay, numbers, given.plain, given.made["left"], H_0, H_0, None, True
            matrices.gradients_of_matrices(p, config, *known)
        names = [(launch, launch[0].__name__) for launch in found]
        wanted += [launch for launch, name in names if name in SCANS or (H > 1 and name not in ALIKE)]
    return wanted
