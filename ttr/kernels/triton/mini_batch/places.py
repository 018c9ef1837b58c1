"""The numbers of a mini-batch: [N, batches, Hv] of masks [SIZE, SIZE], rows [r, SIZE] and mixings [r, r].

Where nothing but gradients moves the weights there is no mask (None), nor rows and mixings, which are 1: what token t reads of
event e is factor_t written_e, of e up to t, with one number a token in `written`, [tokens, Hv], and `factor` None or [Hv, SIZE].
"""

import triton
import triton.language as tl

from ..tiles import load_numbers


@triton.jit
def place_of(n, batch, batches, head, HV: tl.constexpr):
    """A mini-batch's head among those of all sequences."""
    return (n.to(tl.int64) * batches + batch) * HV + head


@triton.jit
def batch_of(T, batches, HV: tl.constexpr, SIZE: tl.constexpr):
    """Of a program in a grid of (sequences x mini-batches, value heads): its head, its first token (int64) and its place."""
    n = tl.program_id(0) // batches
    batch = tl.program_id(0) % batches
    head = tl.program_id(1)
    return head, n.to(tl.int64) * T + batch * SIZE, place_of(n, batch, batches, head, HV)


@triton.jit
def load_token_numbers(base, row, t, valid, SIZE: tl.constexpr):
    """[ROWS], zero behind the last token."""
    return tl.load(base + row * SIZE + t, mask=valid, other=0.0)


@triton.jit
def load_rows_of(rows, row, t, valid, SIZE: tl.constexpr):
    """Q0 of a slot, [ROWS]."""
    if rows is None:
        return tl.zeros_like(t).to(tl.float32) + 1.0
    else:
        return load_token_numbers(rows, row, t, valid, SIZE)


@triton.jit
def load_factor(factor, head, t, valid, SIZE: tl.constexpr):
    """[ROWS], and of the last token."""
    if factor is None:
        one = tl.zeros_like(t).to(tl.float32) + 1.0
        return one, tl.max(one, 0)
    else:
        return tl.load(factor + head * SIZE + t, mask=valid, other=0.0), tl.load(factor + head * SIZE + SIZE - 1)


@triton.jit
def load_written(
    mask, written, factor, row, head, token, t, valid, HV: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """F of a slot, [ROWS]."""
    if mask is None:
        _, last = load_factor(factor, head, t, valid, SIZE)
        return load_numbers(written, head, token, t, valid, HV, 0.0, True) * last
    else:
        return load_token_numbers(written, row, t, valid, SIZE)


@triton.jit
def load_pairs(
    mask, written, factor, place, head, token, t, valid, HV: tl.constexpr, SIZE: tl.constexpr, BEFORE: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """R [ROWS, ROWS]; row: who reads, column: who wrote; TRANSPOSED the other way about. BEFORE: nobody reads himself."""
    if mask is None:
        b = load_numbers(written, head, token, t, valid, HV, 0.0, True)
        c, _ = load_factor(factor, head, t, valid, SIZE)
        reader = t[None, :] if TRANSPOSED else t[:, None]
        writer = t[:, None] if TRANSPOSED else t[None, :]
        pairs = c[None, :] * b[:, None] if TRANSPOSED else c[:, None] * b[None, :]
        return tl.where(reader > writer if BEFORE else reader >= writer, pairs, 0.0)
    else:
        return tl.load(pair_pointers(mask, place, t, SIZE, TRANSPOSED), mask=valid[:, None] & valid[None, :], other=0.0)


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
    pointers = base + keys[:, None] * DV + values[None, :]
    if keys.shape[0] * (DK // keys.shape[0]) == DK and values.shape[0] * (DV // values.shape[0]) == DV:
        tl.store(pointers, x.to(base.dtype.element_ty))
    else:
        tl.store(pointers, x.to(base.dtype.element_ty), mask=(keys < DK)[:, None] & (values < DV)[None, :])
