"""The numbers of a chunk, from those of its tokens, by doubling: blocks of 2^l tokens, l = 0, 1, ..., log2 C.

A token's look row c and read row r are pulled back to the start of its block, its column b is pushed to the end of it:

    row <- row phi_left (of tokens in a right half),   column <- phi_right column (in a left half),   phi <- phi_right phi_left

What token i takes of token j is then row_i . column_j at the level where their blocks are neighbours. Every number is a
product of the transitions A_t: nothing is divided, so any gate is exact. A level that is passed on keeps rows of right halves
and columns of left halves alone, the others are zero; at the last one all of them are kept, as X, Q and F.

levels: [chunks, Hv, 6 LEVELS + 7, C], of each level two numbers of look, read and column; the last row is r_t . b_t, what a
token reads of its own write. mixing: [chunks, Hv, 4], phi of the chunk; transitions: [chunks, Hv, LEVELS, 4, C], phi of
every token's block at every level, for the way back.
"""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import locate, sequence


@triton.jit
def numbers_of(base, head, token, t, valid, tokens, HV: tl.constexpr):
    """The ten numbers of C tokens, each [C]; a token behind the end keeps all and does nothing."""
    here = base + (token + t) * HV + head
    step = tokens.to(tl.int64) * HV
    a00 = tl.load(here, mask=valid, other=1.0)
    a01 = tl.load(here + step, mask=valid, other=0.0)
    b0 = tl.load(here + 2 * step, mask=valid, other=0.0)
    a10 = tl.load(here + 3 * step, mask=valid, other=0.0)
    a11 = tl.load(here + 4 * step, mask=valid, other=1.0)
    b1 = tl.load(here + 5 * step, mask=valid, other=0.0)
    c0 = tl.load(here + 6 * step, mask=valid, other=0.0)
    c1 = tl.load(here + 7 * step, mask=valid, other=0.0)
    r0 = tl.load(here + 8 * step, mask=valid, other=0.0)
    r1 = tl.load(here + 9 * step, mask=valid, other=0.0)
    return a00, a01, a10, a11, b0, b1, c0, c1, r0, r1


@triton.jit
def levels_of(base, slot, head, HV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr):
    """A chunk's and head's place in `levels` (and in their gradients)."""
    return base + (slot.to(tl.int64) * HV + head) * ((6 * LEVELS + 7) * C)


@triton.jit
def load_look(here, level, t, C: tl.constexpr):
    return tl.load(here + 6 * level * C + t), tl.load(here + (6 * level + 1) * C + t)


@triton.jit
def load_read(here, level, t, C: tl.constexpr):
    return tl.load(here + (6 * level + 2) * C + t), tl.load(here + (6 * level + 3) * C + t)


@triton.jit
def load_column(here, level, t, C: tl.constexpr):
    return tl.load(here + (6 * level + 4) * C + t), tl.load(here + (6 * level + 5) * C + t)


@triton.jit
def load_mixing(mixing, slot, head, HV: tl.constexpr):
    """phi_00, phi_01, phi_10, phi_11."""
    here = mixing + (slot.to(tl.int64) * HV + head) * 4
    return tl.load(here), tl.load(here + 1), tl.load(here + 2), tl.load(here + 3)


@triton.jit
def masks(here, t, C: tl.constexpr, LEVELS: tl.constexpr, ERASE: tl.constexpr):
    """P and R, [C, C]: row i of who looks or reads, column j of who wrote. From the widest level to the narrowest."""
    apart = t[:, None] ^ t[None, :]
    looks = tl.zeros([C, C], tl.float32)
    reads = looks
    for step in tl.static_range(LEVELS):
        level = LEVELS - 1 - step
        inside = apart >> (level + 1) == 0
        c0, c1 = load_column(here, level, t, C)
        r0, r1 = load_read(here, level, t, C)
        reads = tl.where(inside, r0[:, None] * c0[None, :] + r1[:, None] * c1[None, :], reads)
        if ERASE:
            l0, l1 = load_look(here, level, t, C)
            looks = tl.where(inside, l0[:, None] * c0[None, :] + l1[:, None] * c1[None, :], looks)
    own = tl.load(here + (6 * LEVELS + 6) * C + t)
    return looks, tl.where(apart == 0, own[:, None], reads)


@kernel("N T tokens scale")
def levels_kernel(
    numbers, levels, mixing, transitions, cu_seqlens, N, T, tokens, scale,
    HV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk and head a program. numbers: [10, tokens, Hv]. BEFORE: queries read before their token's update."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    a00, a01, a10, a11, b0, b1, c0, c1, r0, r1 = numbers_of(
        numbers, head, first + chunk * C, t, chunk * C + t < length, tokens, HV
    )  # fmt: skip
    r0 *= scale
    r1 *= scale
    here = levels_of(levels, slot, head, HV, C, LEVELS)
    if BEFORE:
        own = tl.zeros([C], tl.float32)
    else:
        own = r0 * b0 + r1 * b1
        r0, r1 = r0 * a00 + r1 * a10, r0 * a01 + r1 * a11
    tl.store(here + (6 * LEVELS + 6) * C + t, own)
    for level in range(LEVELS):
        right = (t >> level) % 2 == 1
        at = here + 6 * level * C + t
        tl.store(at, tl.where(right, c0, 0.0))
        tl.store(at + C, tl.where(right, c1, 0.0))
        tl.store(at + 2 * C, tl.where(right, r0, 0.0))
        tl.store(at + 3 * C, tl.where(right, r1, 0.0))
        tl.store(at + 4 * C, tl.where(right, 0.0, b0))
        tl.store(at + 5 * C, tl.where(right, 0.0, b1))
        if transitions is not None:
            kept = transitions + ((slot.to(tl.int64) * HV + head) * LEVELS + level) * (4 * C) + t
            tl.store(kept, a00)
            tl.store(kept + C, a01)
            tl.store(kept + 2 * C, a10)
            tl.store(kept + 3 * C, a11)
        s00, s01, s10, s11 = neighbours(a00, a01, a10, a11, t ^ (1 << level))
        c0, c1 = tl.where(right, c0 * s00 + c1 * s10, c0), tl.where(right, c0 * s01 + c1 * s11, c1)
        r0, r1 = tl.where(right, r0 * s00 + r1 * s10, r0), tl.where(right, r0 * s01 + r1 * s11, r1)
        b0, b1 = tl.where(right, b0, s00 * b0 + s01 * b1), tl.where(right, b1, s10 * b0 + s11 * b1)
        x00, x01, x10, x11 = tl.where(right, a00, s00), tl.where(right, a01, s01), tl.where(right, a10, s10), tl.where(right, a11, s11)
        y00, y01, y10, y11 = tl.where(right, s00, a00), tl.where(right, s01, a01), tl.where(right, s10, a10), tl.where(right, s11, a11)
        a00, a01 = x00 * y00 + x01 * y10, x00 * y01 + x01 * y11
        a10, a11 = x10 * y00 + x11 * y10, x10 * y01 + x11 * y11
    at = here + 6 * LEVELS * C + t
    tl.store(at, c0)
    tl.store(at + C, c1)
    tl.store(at + 2 * C, r0)
    tl.store(at + 3 * C, r1)
    tl.store(at + 4 * C, b0)
    tl.store(at + 5 * C, b1)
    mixed = mixing + (slot.to(tl.int64) * HV + head) * 4 + tl.zeros_like(t)
    tl.store(mixed, a00, mask=t == 0)
    tl.store(mixed + 1, a01, mask=t == 0)
    tl.store(mixed + 2, a10, mask=t == 0)
    tl.store(mixed + 3, a11, mask=t == 0)


@triton.jit
def neighbours(a, b, c, d, other):
    """Four vectors as the token `other` has them."""
    return tl.gather(a, other, 0), tl.gather(b, other, 0), tl.gather(c, other, 0), tl.gather(d, other, 0)
