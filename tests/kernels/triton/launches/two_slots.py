"""The launches of optimizers with one slot beside the weights, forward and backward; heads of 64 are few."""

from unittest import mock

import torch

from ttr.kernels.triton import configs
from ttr.kernels.triton.two_slots import run

from .recording import Launch, Named, recorded

# dk, dv and bytes of a number; the delta rule or the inner product, read before, everything given and packed
SIZES = ((128, 128, 2, True, False), (64, 64, 2, True, False), (128, 128, 2, False, True), (128, 128, 4, True, False))
SUBSET = SIZES[1:3]  # both rules


def launches(everything: bool) -> Named:
    for sizes in SIZES if everything else SUBSET:
        for launch in called(*sizes):
            yield f"two slots {' '.join(map(str, sizes))}", launch, True


def called(dk: int, dv: int, itemsize: int, erase: bool, packed: bool) -> list[Launch]:
    with recorded() as found, mock.patch.object(configs, "multiprocessors", lambda arch: 132):
        B, T, H, dtype = 1 if packed or dk == 64 else 8, 2048, 16, {2: torch.bfloat16, 4: torch.float32}[itemsize]
        q, v = torch.empty(B, T, H, dk, dtype=dtype), torch.empty(B, T, H, dv, dtype=dtype)
        first = torch.empty(8, H, 2, dk, dv) if packed else None
        given = q, q, v, torch.empty(10, B, T, H), first, torch.empty(9, dtype=torch.int32) if packed else None
        o, last, saved = run.forward(*given, 0.1, run.Rule(erase, packed), True)
        run.backward(o, last if packed else None, *given, saved, 0.1, run.Rule(erase, packed))
    return found
