"""Gated sums over the pairs of a chunk, and what they mean as matrices, without a [C, C, dk] tensor.

The decay from pair s to a read at t is a product of exp(log_decay) over s < j <= t (j < t for a read before the
token). It is taken through the midpoint m of the block in which s is left of m and t is right of it: (m..t) times
(s..m). So nothing is ever divided, no positive number is exponentiated, and a log decay of -inf is as good as any other.
Doubling the block gives every pair once, in log2 C levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Every tensor here has the leading axes [N, H, chunks], written `..` below.


def _shifted(x: Tensor) -> Tensor:
    """Along tokens: zero first, the last one dropped (an exclusive sum from an inclusive one)."""
    return F.pad(x, (0, 0, 1, 0))[..., :-1, :]


def _up_to(log_decay: Tensor, before: bool) -> Tensor:
    """[.., L, d] -> the product over the tokens up to each one, its own left out if `before`."""
    total = log_decay.cumsum(-2)
    return (_shifted(total) if before else total).exp()


def _after(log_decay: Tensor) -> Tensor:
    """[.., L, d] -> the product over the tokens after each one."""
    return _shifted(log_decay.flip(-2).cumsum(-2)).flip(-2).exp()


@dataclass(frozen=True)
class Decays:
    """The decays of chunks, from log decays [.., C, d], d in (1, dk), C a power of two.

    start, end: [.., C, d], from the chunk's start to a token's read and from a token's write to the chunk's end.
    total: [.., d]. levels: (right, left), each [.., blocks, half, d], for blocks of 2, 4, ... C tokens.
    mask: [.., C, C] for d = 1, row t, column s, zero where s is not read at t; None for d = dk.
    before: reads stand before the token's own decay and write.
    """

    start: Tensor
    end: Tensor
    total: Tensor
    levels: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    before: bool

    @classmethod
    def of(cls, log_decay: Tensor, before: bool) -> Decays:
        levels, size = [], 2
        while size <= log_decay.shape[-2]:
            left, right = halves(log_decay, size)
            levels.append((_up_to(right, before), _after(left)))
            size *= 2
        start, end, total = _up_to(log_decay, before), _after(log_decay), log_decay.sum(-2).exp()
        mask = _mask(start, levels, before) if log_decay.shape[-1] == 1 else None
        return cls(start, end, total, levels, mask, before)


def _mask(like: Tensor, levels: list[tuple[Tensor, Tensor]], before: bool) -> Tensor:
    """Scalar decays as one matrix [.., C, C], block by block."""
    blocks = like.new_full((*like.shape, 1), 0.0 if before else 1.0)  # [.., C, 1, 1]
    for right, left in levels:
        above, below = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        blocks = torch.cat([F.pad(above, (0, above.shape[-1])), torch.cat([right * left.mT, below], -1)], -2)
    return blocks.squeeze(-3)


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[.., C, d] -> the left and right halves of its blocks of `size` tokens, each [.., blocks, size / 2, d]."""
    left, right = x.unflatten(-2, (-1, 2, size // 2)).unbind(-3)
    return left, right


def _add_right(y: Tensor, part: Tensor) -> None:
    """Add [.., blocks, half, d] to the right halves of the blocks of y [.., C, d], in place."""
    y.unflatten(-2, (-1, 2, part.shape[-2]))[..., 1, :, :].add_(part)


def gated_read(x: Tensor, k: Tensor, values: Tensor, decays: Decays, start: Tensor) -> Tensor:
    """o_t = G_t^T x_t with G_t = decay_t0 G_0 + sum_s decay_ts k_s values_s^T.

    x, k: [.., C, dk]; values: [.., C, dv]; start, G_0: [.., dk, dv] -> [.., C, dv].
    """
    o = (decays.start * x) @ start
    if decays.mask is not None:
        return o + ((x @ k.mT) * decays.mask) @ values
    if not decays.before:
        o = o + (x * k).sum(-1, keepdim=True) * values
    for right, left in decays.levels:
        size = 2 * right.shape[-2]
        scores = (halves(x, size)[1] * right) @ (halves(k, size)[0] * left).mT
        _add_right(o, scores @ halves(values, size)[0])
    return o


# The Gram matrices M_t = H_t + diag(ridge_t), H_t = A_t0 H_0 A_t0 + sum_s weight_s (A_ts k_s)(A_ts k_s)^T with A the
# square root of the decay. A form is a pair of functions of the same tensors `theta`: the product M_t p_t for all tokens
# at once, and M_t itself for those who can afford it (one chunk).


@dataclass(frozen=True)
class ScalarGram:
    """One decay per head.

    theta: H_0 [.., dk, dk], start [.., C, 1], pairs [.., C, C], what row t has of w_s k_s k_s^T, k and ridge, each [.., C, dk].
    """

    @staticmethod
    def theta(k: Tensor, weight: Tensor, decays: Decays, H: Tensor, ridge: Tensor) -> tuple[Tensor, ...]:
        assert decays.mask is not None
        return H, decays.start, decays.mask * weight.mT, k, ridge

    @staticmethod
    def product(p: Tensor, *theta: Tensor) -> Tensor:
        H, start, pairs, k, ridge = theta
        return start * (p @ H) + ((p @ k.mT) * pairs) @ k + ridge * p

    @staticmethod
    def dense(*theta: Tensor) -> Tensor:
        """[.., C, dk, dk]"""
        H, start, pairs, k, ridge = theta
        outer = (k[..., :, None] * k[..., None, :]).flatten(-2)
        return start[..., None] * H[..., None, :, :] + (pairs @ outer).unflatten(-1, H.shape[-2:]) + torch.diag_embed(ridge)


@dataclass(frozen=True)
class ChannelGram:
    """One decay per key channel, entering both sides of H by its square root.

    theta: H_0 [.., dk, dk], start, k, weighted k and ridge, each [.., C, dk], then for each level `right` and the
    decayed left keys, plain and weighted, each [.., blocks, half, dk].
    """

    before: bool

    @staticmethod
    def theta(k: Tensor, weight: Tensor, roots: Decays, H: Tensor, ridge: Tensor) -> tuple[Tensor, ...]:
        levels = []
        for right, left in roots.levels:
            keys = halves(k, 2 * right.shape[-2])[0] * left
            levels += [right, keys, halves(weight, 2 * right.shape[-2])[0] * keys]
        return H, roots.start, k, weight * k, ridge, *levels

    def product(self, p: Tensor, *theta: Tensor) -> Tensor:
        H, start, k, written, ridge, *levels = theta
        y = start * ((start * p) @ H) + ridge * p
        if not self.before:
            y = y + (p * k).sum(-1, keepdim=True) * written
        for right, keys, weighted in zip(*[iter(levels)] * 3, strict=True):
            p_right = halves(p, 2 * right.shape[-2])[1]
            _add_right(y, right * (((right * p_right) @ keys.mT) @ weighted))
        return y

    def dense(self, *theta: Tensor) -> Tensor:
        """[.., C, dk, dk]"""
        H, start, k, written, ridge, *levels = theta

        def both(x: Tensor) -> Tensor:
            return x[..., :, None] * x[..., None, :]

        M = both(start) * H[..., None, :, :] + torch.diag_embed(ridge.expand(start.shape))
        if not self.before:
            M = M + written[..., :, None] * k[..., None, :]
        for right, keys, weighted in zip(*[iter(levels)] * 3, strict=True):
            left_of_midpoint = weighted.mT @ keys  # seen by every token on the right
            M.unflatten(-3, (-1, 2, right.shape[-2]))[..., 1, :, :, :].add_(both(right) * left_of_midpoint[..., None, :, :])
        return M
