"""The launches over mini-batches on one layer, forward and backward, in bfloat16."""

import torch

from ttr.kernels.triton.mini_batch import run

from .recording import Launch, Named, recorded

# dk, dv, tokens of a mini-batch, slots; with a bias, with a norm and the residual: TTT-Linear, its widest head, momentum
SIZES = ((64, 64, 16, 1, True, True), (128, 128, 16, 1, True, True), (64, 64, 64, 2, False, True), (128, 128, 64, 1, False, False))


def launches(everything: bool) -> Named:
    for sizes in SIZES:
        for launch in called(*sizes):
            yield f"mini-batch {' '.join(map(str, sizes[:4]))}", launch, True


def called(dk: int, dv: int, size: int, slots: int, biased: bool, normed: bool) -> list[Launch]:
    with recorded() as found:
        B, M, H = 8, 32, 16
        q, v = torch.empty(B, M * size, H, dk, dtype=torch.bfloat16), torch.empty(B, M * size, H, dv, dtype=torch.bfloat16)
        mask, rows, kept = (torch.empty(B, M, H, *shape) for shape in ((size, size), (slots, size), (slots, slots)))
        gamma = torch.empty(H, dv) if normed else None
        first, first_bias = torch.empty(B, H, slots, dk, dv), torch.empty(B, H, slots, dv) if biased else None
        form = run.Form(size, normed, 1e-6, 1 / dv, 1 / dv, False)
        if biased:  # as TTT: nothing but gradients moves the weights
            numbers = None, None, torch.empty(B, M * size, H), None, torch.empty(H, size)
        else:
            numbers = mask, rows, rows, kept, None
        given = q, q, v, *numbers, gamma, gamma
        o, last, last_bias, *saved = run.forward(*given, first, first_bias, form)
        for ends in ((last, last_bias), (None, None)):
            run.backward(o, *ends, *given, first, first_bias, *saved, form)
    return found
