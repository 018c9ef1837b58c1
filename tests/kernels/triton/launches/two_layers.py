"""The launches of mini-batches on two layers, forward and backward, in bfloat16, as on a GPU of 132 multiprocessors."""

from unittest import mock

import torch

from ttr.kernels.triton.two_layers import groups, run

from .recording import Launch, Named, recorded

# tokens of a mini-batch, slots, warps of a scan; with biases: Titans' memory (and with biases), TTT-MLP; heads of 64, 256 hidden units
SIZES = ((64, 2, 4, False), (16, 1, 8, True), (64, 2, 8, False), (16, 1, 4, True), (64, 2, 4, True), (64, 2, 8, True))
SUBSET = SIZES[:2]


def launches(everything: bool) -> Named:
    for sizes in SIZES if everything else SUBSET:
        for launch in called(*sizes):
            yield f"two layers {' '.join(map(str, sizes[:3]))}{' biased' * sizes[3]}", launch, True


def called(size: int, slots: int, warps: int, biased: bool) -> list[Launch]:
    parts = mock.patch.object(groups, "parts_of", lambda hidden, device: hidden // 64)
    together = mock.patch.object(run, "heads_at_once", lambda hidden, device: 66)
    whole = mock.patch.object(groups, "heads_at_once", lambda hidden, device: 66)
    few = mock.patch.object(run, "group_of", lambda batches, heads, hidden, device: 2)
    own = mock.patch.object(groups, "warps_of", lambda heads, hidden, device: warps)
    groups.launches.cache_clear()  # whose keys name no warps: what is patched here decides them
    with recorded() as found, parts, together, whole, few, own:
        B, M, H, d, hidden = 2, 4, 16, 64, 256
        q = torch.empty(B, M * size, H, d, dtype=torch.bfloat16)
        form = groups.Form(size, hidden, biased, "gelu_tanh" if biased else "gelu", True, 1e-6, 1 / d, 1 / d, False)
        if slots == 1:  # as TTT: nothing but gradients moves the weights
            numbers = None, None, torch.empty(B, M * size, H), None, torch.empty(H, size)
        else:
            numbers = None, None, torch.empty(10, B, M * size, H), None, None
        given = q, q, q, *numbers, torch.empty(H, d), torch.empty(H, d)
        first = torch.empty(B, H, slots, 2 * d * hidden + (hidden + d if biased else 0))
        o, last, checkpoints = run.forward(*given, first, form, True)
        run.backward(o, last, *given, first, checkpoints, form)
    return found
