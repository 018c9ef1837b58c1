"""What the optimizer and the gate make of a mini-batch whose gradients are frozen: numbers, without any weights.

Event e writes its gradient g_e; the weights that token t reads, and the slots behind the mini-batch, are

    W_t = sum_k Q0_kt z_k + sum_e R_te g_e,      z_k <- sum_l phi_kl z_l + sum_e F_ke g_e       z: the slots when it began
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...constant import constant
from ...lowering import Coefficients, any_signals, coefficients
from .chunk import double, tokens_as_blocks


@constant
def stands_still(spec) -> bool:
    """Whether nothing but gradients moves the weights, and they are read as they are: one slot, nothing decays it."""
    lead = (64, 1)
    probed = coefficients(spec, any_signals(spec.optimizer.signals(), *lead, 1, 1), None, lead, False)
    still = probed.A.shape[0] == 1 and bool((probed.A == 1).all()) and bool((probed.read == 1).all())
    return still and not spec.gate.decays


def masks(spec, probed: Coefficients) -> dict[str, Tensor]:
    """Of coefficients with axes [..., N, H, m tokens, n micro-steps, 1, 1]: each [N, H, ...].

    R [m, m n], Q0 [r, m], F [r, m n], phi [r, r], and c [r, m n], where the gradients look.
    """
    A, b, c, read = (x[..., 0] for x in (probed.A, probed.b, probed.c, probed.read))
    made = (_of_one_slot if len(b) == 1 else _of_slots)(spec, A, b, read)
    return {**made, "c": c.flatten(3).movedim(0, 2)}


def _of_one_slot(spec, A: Tensor, b: Tensor, read: Tensor) -> dict[str, Tensor]:
    """What is left of an event is a product of numbers."""
    m, n = b.shape[3:5]
    a, b, read = A[0, 0].flatten(2), b[0].flatten(2), read[0, ..., 0]  # [N, H, events]; read: tokens
    at = torch.arange(m * n, device=b.device)
    seen = at[:, None] >= at[None, :]
    if stands_still(spec):
        left, since = seen.to(b.dtype), torch.ones_like(a)
    else:
        each = torch.where(at[:, None] > at[None, :], a[..., :, None], 1.0)
        left, since = torch.where(seen, each.cumprod(-2), 0.0), a.cumprod(-1)
    written = left * b[..., None, :]
    if spec.read.at == "before":
        R, Q0 = pad(written, (0, 0, 1, 0))[..., :-1:n, :], pad(since, (1, 0), value=1.0)[..., :-1:n]
    else:
        R, Q0 = written[..., n - 1 :: n, :], since[..., n - 1 :: n]
    return {"R": read[..., None] * R, "Q0": (read * Q0)[..., None, :], "F": written[..., -1:, :], "phi": since[..., -1:, None]}


def _of_slots(spec, A: Tensor, b: Tensor, read: Tensor) -> dict[str, Tensor]:
    """From the doubling of chunk.py, on coefficients alone."""
    read_before = spec.read.at == "before"
    r, N, H, m, n = b.shape[:5]
    more = (1 << (m - 1).bit_length()) - m  # doubling wants a power of two: the rest are no events
    if more:
        eye = torch.eye(r, dtype=A.dtype, device=A.device).view(r, r, 1, 1, 1, 1, 1).expand(r, r, N, H, more, n, 1)
        A = torch.cat([A, eye], 4)
        b, read = (torch.cat([x, x.new_zeros(*x.shape[:3], more, *x.shape[4:])], 3) for x in (b, read))
    blocks = tokens_as_blocks(A.flatten(2, 3), None, b.flatten(1, 2)[None], read.flatten(1, 2), read_before)
    while blocks.read.shape[2] > 1:
        blocks = double(blocks)
    heads = (N, H)
    return {
        "R": blocks.R[0, :, 0].unflatten(0, heads)[:, :, :m, : m * n],
        "Q0": blocks.read[:, :, 0, :m, 0].unflatten(1, heads).movedim(0, 2),
        "F": blocks.column[0, :, :, 0, : m * n, 0].unflatten(1, heads).movedim(0, 2),
        "phi": blocks.phi[:, :, :, 0, 0].unflatten(2, heads).movedim((0, 1), (2, 3)),
    }
