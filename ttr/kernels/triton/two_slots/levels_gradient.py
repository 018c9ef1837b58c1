"""The doubling of `levels` backwards: from the gradients of a chunk's numbers to those of its tokens' ten."""

import triton.language as tl

from ..launch import kernel
from ..tiles import locate, sequence
from .levels import levels_of, load_column, load_look, load_mixing, load_read, neighbours, numbers_of


@kernel("N T tokens scale")
def levels_gradient_kernel(
    numbers, levels, transitions, dlevels, dmixing, dnumbers, cu_seqlens, N, T, tokens, scale,
    HV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ERASE: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk and head a program. dnumbers: [10, tokens, Hv].

    The gradient of a block's phi is the sum of what its tokens hold of it. Where a block falls into two, every token takes
    its neighbour's part too and brings both to its own half; after the last one each holds what is its own.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    here = levels_of(levels, slot, head, HV, C, LEVELS)
    given = levels_of(dlevels, slot, head, HV, C, LEVELS)
    dc0 = tl.zeros([C], tl.float32)
    dc1 = dc0
    if ERASE:
        dc0, dc1 = load_look(given, LEVELS, t, C)
    dr0, dr1 = load_read(given, LEVELS, t, C)
    db0, db1 = load_column(given, LEVELS, t, C)
    m00, m01, m10, m11 = load_mixing(dmixing, slot, head, HV)
    da00 = tl.where(t == 0, m00, 0.0)
    da01 = tl.where(t == 0, m01, 0.0)
    da10 = tl.where(t == 0, m10, 0.0)
    da11 = tl.where(t == 0, m11, 0.0)
    for step in range(LEVELS):
        level = LEVELS - 1 - step
        other = t ^ (1 << level)
        right = (t >> level) % 2 == 1
        kept = transitions + ((slot.to(tl.int64) * HV + head) * LEVELS + level) * (4 * C) + other
        s00 = tl.load(kept)
        s01 = tl.load(kept + C)
        s10 = tl.load(kept + 2 * C)
        s11 = tl.load(kept + 3 * C)
        # of the neighbour's phi, by the row or the column that it was multiplied into
        r0, r1 = load_read(here, level, t, C)
        b0, b1 = load_column(here, level, t, C)
        u00 = r0 * dr0 + db0 * b0
        u01 = r0 * dr1 + db0 * b1
        u10 = r1 * dr0 + db1 * b0
        u11 = r1 * dr1 + db1 * b1
        if ERASE:
            c0, c1 = load_look(here, level, t, C)
            u00 += c0 * dc0
            u01 += c0 * dc1
            u10 += c1 * dc0
            u11 += c1 * dc1
            dc0, dc1 = tl.where(right, dc0 * s00 + dc1 * s01, dc0), tl.where(right, dc0 * s10 + dc1 * s11, dc1)
            x0, x1 = load_look(given, level, t, C)
            dc0 += x0
            dc1 += x1
        dr0, dr1 = tl.where(right, dr0 * s00 + dr1 * s01, dr0), tl.where(right, dr0 * s10 + dr1 * s11, dr1)
        x0, x1 = load_read(given, level, t, C)
        dr0 += x0
        dr1 += x1
        db0, db1 = tl.where(right, db0, db0 * s00 + db1 * s10), tl.where(right, db1, db0 * s01 + db1 * s11)
        x0, x1 = load_column(given, level, t, C)
        db0 += x0
        db1 += x1
        # of both halves' phi, by their product
        g00, g01, g10, g11 = neighbours(da00, da01, da10, da11, other)
        g00 += da00
        g01 += da01
        g10 += da10
        g11 += da11
        u00, u01, u10, u11 = neighbours(u00, u01, u10, u11, other)
        da00 = u00 + tl.where(right, g00 * s00 + g01 * s01, s00 * g00 + s10 * g10)
        da01 = u01 + tl.where(right, g00 * s10 + g01 * s11, s00 * g01 + s10 * g11)
        da10 = u10 + tl.where(right, g10 * s00 + g11 * s01, s01 * g00 + s11 * g10)
        da11 = u11 + tl.where(right, g10 * s10 + g11 * s11, s01 * g01 + s11 * g11)
    token = first + chunk * C
    valid = chunk * C + t < length
    a00, a01, a10, a11, b0, b1, _, _, r0, r1 = numbers_of(numbers, head, token, t, valid, tokens, HV)
    if not BEFORE:
        own = tl.load(given + (6 * LEVELS + 6) * C + t)
        da00 += scale * r0 * dr0
        da01 += scale * r0 * dr1
        da10 += scale * r1 * dr0
        da11 += scale * r1 * dr1
        dr0, dr1 = a00 * dr0 + a01 * dr1 + own * b0, a10 * dr0 + a11 * dr1 + own * b1
        db0 += scale * own * r0
        db1 += scale * own * r1
    to = dnumbers + (token + t) * HV + head
    between = tokens.to(tl.int64) * HV
    tl.store(to, da00, mask=valid)
    tl.store(to + between, da01, mask=valid)
    tl.store(to + 2 * between, db0, mask=valid)
    tl.store(to + 3 * between, da10, mask=valid)
    tl.store(to + 4 * between, da11, mask=valid)
    tl.store(to + 5 * between, db1, mask=valid)
    tl.store(to + 6 * between, dc0, mask=valid)
    tl.store(to + 7 * between, dc1, mask=valid)
    tl.store(to + 8 * between, scale * dr0, mask=valid)
    tl.store(to + 9 * between, scale * dr1, mask=valid)
