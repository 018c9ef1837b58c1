"""Where the numbers of a mini-batch lie: [N, batches, Hv] of masks [SIZE, SIZE], rows [r, SIZE] and mixings [r, r]."""

import triton
import triton.language as tl


@triton.jit
def place_of(n, batch, batches, head, HV: tl.constexpr):
    """A mini-batch's head among those of all sequences."""
    return (n.to(tl.int64) * batches + batch) * HV + head


@triton.jit
def load_token_numbers(base, row, t, valid, SIZE: tl.constexpr):
    """[ROWS], zero behind the last token."""
    return tl.load(base + row * SIZE + t, mask=valid, other=0.0)


@triton.jit
def pair_pointers(base, place, t, SIZE: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Of [SIZE, SIZE]; row: who reads, column: who wrote; TRANSPOSED the other way about."""
    here = base + place * SIZE * SIZE
    return here + (t[None, :] * SIZE + t[:, None] if TRANSPOSED else t[:, None] * SIZE + t[None, :])


@triton.jit
def load_mixing(base, place):
    """phi [2, 2]: what a slot takes of itself and of the other, first slot then second."""
    here = base + place * 4
    return tl.load(here), tl.load(here + 1), tl.load(here + 2), tl.load(here + 3)


@triton.jit
def load_affine(gamma, beta, head, columns, D: tl.constexpr, NORM: tl.constexpr):
    """The norm's scale and shift of a head; 1 and 0 where there is none."""
    if NORM:
        inside = columns < D
        scale = tl.load(gamma + head * D + columns, mask=inside, other=0.0)
        return scale, tl.load(beta + head * D + columns, mask=inside, other=0.0)
    else:
        zero = tl.zeros_like(columns).to(tl.float32)
        return zero + 1.0, zero


@triton.jit
def store_block(base, x, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """The inverse of `load_block`."""
    mask = (keys < DK)[:, None] & (values < DV)[None, :]
    tl.store(base + keys[:, None] * DV + values[None, :], x.to(base.dtype.element_ty), mask=mask)
