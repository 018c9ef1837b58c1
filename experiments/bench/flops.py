"""Operations of a layer's large matmuls: what its time is held against where they bound it."""

from __future__ import annotations

import ttr
from experiments.bench.shapes import Shape
from ttr.inner_optim.muon import COEFFICIENTS


def lact(shape: Shape, kind: str, *, mini_batch: int | None = None) -> float:
    """Of the LaCT layer: N = B T tokens, H heads of D channels, width d = H D, fast weights D x h, chunks of m tokens.

        projections   4 x 2 N d^2            q, k, v, o
        read          3 x 2 N d h            q through W1, W3, W2
        write         6 x 2 N d h            k through W1, W3; v back through W2; the three gradients
        Muon          3 H B T/m x 5 x (4 D h min(D, h) + 2 min(D, h)^3)

    `both` adds twice as much again: every product has two in the backward pass. It goes without the write of the last
    chunk, which no token reads. What a path makes again, or makes and does not need, is not counted.
    """
    spec = ttr.spec("lact")
    m, width = mini_batch or int(spec.mini_batch), shape.H * shape.dk
    hidden = spec.regressor.state_shapes(shape.dk, shape.dk)["W1"][1]
    small = min(shape.dk, hidden)
    iteration = 4 * shape.dk * hidden * small + 2 * small**3
    step = 3 * shape.H * len(COEFFICIENTS[spec.optimizer.coefficients]) * iteration

    def product(tokens: int) -> float:
        return 2 * shape.B * tokens * width * hidden

    always = 4 * 2 * shape.B * shape.T * width**2 + 3 * product(shape.T)
    forward = always + 6 * product(shape.T) + shape.B * (shape.T // m) * step
    if kind == "forward":
        return forward
    read = (shape.T - 1) // m  # chunks whose write is read
    return forward + 2 * (always + 6 * product(read * m) + shape.B * read * step)
