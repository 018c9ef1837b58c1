"""Which sizes of heads and which numbers the Triton kernels take, decided without triton."""

from __future__ import annotations

import torch

from .eligible import DTYPES, by_channel, in_float32, interpreted, pad_of, why_not_chunks

LARGEST = 256  # channels of a head
LARGEST_LAYER = 128  # with mini-batches, with a slot beside the weights, with a decay for every key channel
LARGEST_OF_TWO, LARGEST_HIDDEN = 64, 8192  # of a memory of two layers: channels of a head, hidden units
LARGEST_SOLVE = 128  # key channels of least squares in float32: the solve holds a matrix [dk, dk]


def why_not_sizes(spec, dtype: torch.dtype | None, dk: int | None, dv: int | None) -> str | None:
    """The reason for which the kernels do not take such numbers or heads, or None; None for what is not known."""
    if dtype is not None and dtype not in DTYPES:
        return f"inputs (q, k, v, or a signal) are {dtype}; choose from {[str(d) for d in DTYPES]}"
    if spec.regressor.family == "trained" and spec.mini_batch == 1 and why_not_chunks(spec) is not None:
        return f"dk={dk}; choose 1 to {LARGEST}" if dk is not None and not 0 < dk <= LARGEST else None
    layers = None if spec.mini_batch == 1 else spec.regressor.layers()
    slots = spec.regressor.family == "trained" and spec.optimizer.slots
    channels = spec.regressor.family == "trained" and by_channel(spec)
    largest = LARGEST if layers is None and not slots and not channels else LARGEST_LAYER
    deep = layers is not None and layers.activation is not None
    if deep:
        largest = LARGEST_OF_TWO
    for name, d in (("dk", dk), ("dv", dv)):
        if d is not None and (d % 16 or not 0 < d <= largest):
            return f"{name}={d}; choose a multiple of 16 up to {largest}"
    if deep and dk is not None and dv is not None:
        _, hidden = next(iter(spec.regressor.state_shapes(dk, dv).values()))
        if hidden > LARGEST_HIDDEN:
            return f"regressor {spec.regressor.kind!r} has {hidden} hidden units; choose up to {LARGEST_HIDDEN}"
    squares = spec.regressor.family == "least_squares"
    if squares and dk is not None and dk > LARGEST_SOLVE and in_float32(spec):
        what = "a decaying ridge" if spec.optimizer.kind == "cg" else f"optimizer {spec.optimizer.kind!r}"
        return f"dk={dk}; with {what} least squares takes up to {LARGEST_SOLVE}"
    if squares and dtype == torch.float32 and dk is not None and dk > LARGEST_SOLVE:
        return f"dk={dk} in torch.float32; least squares takes up to {LARGEST_SOLVE} there, up to {LARGEST} in 16 bits"
    if dv is not None and dv + pad_of(spec, dv) > largest:
        what = "the ridge's scale" if squares else "the normaliser's channel"
        return f"dv={dv} and {what} pass {largest}; choose dv up to {largest - 16}"
    return _why_not_run(spec, dtype, dk, dv) if deep and dtype is not None and dtype.itemsize == 2 and not interpreted() else None


def _why_not_run(spec, dtype: torch.dtype, dk: int | None, dv: int | None) -> str | None:
    """In 16 bits Triton 3.6 compiles tiles narrower than 64 to wrong numbers or addresses on Hopper, and two layers have such."""
    if spec.mini_batch not in (16, 64):
        tokens = f"optimizer.mini_batch={spec.mini_batch} in {dtype}"
        return f"{tokens}: on two layers the kernels have been run with 16 and 64 tokens; choose those, or torch.float32"
    if dk is None or dv is None:
        return None
    if (dk, dv) != (64, 64):
        return f"dk={dk}, dv={dv} in {dtype}: on two layers the kernels are right with heads of 64 alone; choose those, or torch.float32"
    if next(iter(spec.regressor.state_shapes(dk, dv).values()))[1] % 64:
        return f"regressor {spec.regressor.kind!r} has hidden units that are no multiple of 64 in {dtype}; choose one, or torch.float32"
    return None
