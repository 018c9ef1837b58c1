"""The launches of least squares with a decay a head, and of the exact solves, which take every decay."""

import torch

from ttr.kernels.triton.least_squares import plan, run
from ttr.kernels.triton.shapes import sizes_of

from .recording import Launch, Named, recorded

SIZES = ((64, 2), (128, 2), (256, 2), (128, 4))  # dk, the bytes of a number
SUBSET = SIZES[1:2]  # MesaNet's heads
EXACT = tuple((dk, gate) for dk in (128, 64) for gate in ("none", "head", "channel"))
EXACT_SUBSET = EXACT[:3]


def launches(everything: bool) -> Named:
    for sizes in SIZES if everything else SUBSET:
        for launch in by_gradients(*sizes):
            yield f"least squares {' '.join(map(str, sizes))}", launch, True
    for dk, gate in EXACT if everything else EXACT_SUBSET:
        for launch in exact(dk, gate):
            yield f"exact {dk} {gate}", launch, True


def by_gradients(dk: int, itemsize: int) -> list[Launch]:
    """The statistics, in one segment and in several, and both solves, with everything given."""
    with recorded() as found:
        for B, T, H in ((8, 2048, 16), (1, 65536, 1)):
            dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
            q, numbers, H_0 = torch.empty(B, T, H, dk, dtype=dtype), torch.empty(B, T, H), torch.empty(B, H, dk, dk)
            form = plan.Form(1.0, 30, 0.0, False)
            p = plan.plan(plan.kind_of(q, q, numbers, numbers, H_0, None, form.before)._replace(arch="sm_90"))
            given, _ = run.statistics(p, q, numbers, numbers, H_0, None)
            for other in (None, q):
                run.solve(p, given, q, q, numbers, numbers, torch.empty(H, dk), other, None, form, 1.0)
    return [launch for launch in found if launch[0].__name__ in ("statistics_kernel", "solve_kernel")]


def exact(dk: int, gate: str) -> list[Launch]:
    """All of them in float32."""
    with recorded() as found:
        B, T, H = 8, 2048, 16
        q, numbers, states = torch.empty(B, T, H, dk), torch.empty(B, T, H), torch.empty(B * T // 32 * H, dk, dk)
        decay = {"none": None, "head": numbers, "channel": q}[gate]
        given = sizes_of(q, q, None), 32, states, None if gate == "channel" else numbers, q, q, decay, numbers, torch.empty(H, dk), None
        run.solve_exactly(*given, plan.Form(1.0, None, 0.0, False), 1.0)
    return found
