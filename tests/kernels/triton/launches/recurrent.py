"""The launches of one event at a time, two a token; the last ones packed, and without some of the gradients."""

import torch

from ttr.kernels.triton.recurrent import run

from .recording import Launch, Named, recorded

# slots, dk and dv; what of the coefficients has key channels (d1) and value channels (d2), of the read as well; keys to write with
RECURRENCES = {
    "slot": (1, 128, 128, 1, 1, True), "slots": (2, 128, 128, 1, 1, False), "columns": (1, 128, 1, 128, 1, False),
    "all": (2, 64, 64, 64, 64, False),
}  # fmt: skip


def launches(everything: bool) -> Named:
    for name, numbers in RECURRENCES.items():
        for launch in called(*numbers):
            yield f"recurrent {name}", launch, True


def called(r: int, d: int, d1: int, d2: int, read: int, separate: bool) -> list[Launch]:
    with recorded() as found:
        heads, T, n = 16, 2048, 2
        q, row, number = torch.empty(heads, T, d), torch.empty(heads, T, n, d), torch.empty(r, heads, T, n, d1, d2)
        A, read_by = torch.empty(r, r, heads, T, n, d1, d2), torch.empty(r, heads, T, 1, 1)
        read_by = number[:, :, :, 0] if read > 1 else read_by
        known = (number, row, row) if separate else (None, None, None)
        x = run.Numbers(q, row, None if separate else row, A, number, number, read_by, *known)
        for first, bounds, wanted in (
            (torch.empty(r, heads, d, d), None, True),
            (torch.empty(r, 8 * heads, d, d), torch.empty(9, dtype=torch.int32), False),
        ):
            form = run.Form(True, False, heads)
            o, last = run.forward(x, first, bounds, form)
            run.backward(o, last, x, first, bounds, form, [True, True, True, wanted, *[True] * 6, wanted])
    return found
