"""Mirrors: the map from the weights that are stored to those that predict. They compose with any first-order optimizer.

Gates and steps act on what is stored, A; losses and queries see W = mirror(A), and the gradient is taken at W, not through
the map. Retentions other than weight decay are this: mirror descent and dual averaging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..piece import Piece
from ..registry import MIRRORS, SpecError, mirror


@dataclass(frozen=True, kw_only=True)
class Mirror(Piece):
    registry: ClassVar = MIRRORS

    @property
    def identity(self) -> bool:
        """Whether the weights are used as they are stored."""
        return False

    def __call__(self, weight: Tensor) -> Tensor:
        """One stored weight tensor of a head, [d_in, d_out] or a bias [d_out], as it predicts; the same shape."""
        raise NotImplementedError(f"mirror {self.kind!r} must define __call__(weight)")


@mirror("none")
@dataclass(frozen=True, kw_only=True)
class NoMirror(Mirror):
    """The weights as they are stored."""

    @property
    def identity(self):
        return True

    def __call__(self, weight):
        return weight


@mirror("norm")
@dataclass(frozen=True, kw_only=True)
class Norm(Mirror):
    """W = A / ||A||_q^(q - 2), over all entries of a weight tensor; q = 2 is no map at all.

    ||A||_q is (sum |A|^q + eps^q)^(1/q), so weights of zero stay zero. Source: MIRAS (2504.13173), MONETA at q = 4, from
    secondary transcripts; its general derivation has the conjugate exponent in place of q.
    """

    q: float = 4.0
    eps: float = 1e-6

    def __post_init__(self):
        if not self.q > 1:
            raise SpecError(f"mirror.q={self.q}: expected > 1")
        if not self.eps > 0:
            raise SpecError(f"mirror.eps={self.eps}: expected > 0 (weights of zero have no norm to divide by)")

    @property
    def identity(self):
        return self.q == 2

    def __call__(self, weight):
        return weight / (weight.abs().pow(self.q).sum() + self.eps**self.q).pow((self.q - 2) / self.q)


@mirror("softmax")
@dataclass(frozen=True, kw_only=True)
class Softmax(Mirror):
    """W = softmax(A), each slice of a weight tensor on the simplex: what an output unit takes in, or what an input gives out.

    A constant added to a slice changes nothing, so A_t = alpha A_{t-1} - step g is W_t = softmax(alpha log W_{t-1} - step g),
    the step of retention by KL divergence. A bias is one slice. Source: MIRAS (2504.13173), MEMORA, from secondary
    transcripts, which leave the slice open.
    """

    over: Literal["inputs", "outputs"] = "inputs"

    def __call__(self, weight):
        return torch.softmax(weight, -2 if weight.ndim > 1 and self.over == "inputs" else -1)
