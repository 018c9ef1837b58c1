"""All that a scan over chunks takes of a chunk's keys, queries and decays; every chunk on its own.

With x the keys as they look, w as they write, times their weights, and G the decays of a chunk summed, before the token itself for
who looks or reads before it:

    queries = scale q 2^G         writes = w 2^(whole - G)                    left = 2^whole
    reads_ij = scale sum_k q_ik w_jk 2^(G_ik - G_jk), i >= j
    A_ij = sum_k x_ik w_jk 2^(G_ik - G_jk), i > j       inverse = (I + A)^-1       looks = -inverse (x 2^G)

What is written of the values as they are, with keys p of its own (ADDED), likewise: added and added_reads of p instead of w,
and added_errors = -inverse A of p, the part of the errors that comes of it; for backward also added_looks = A of p itself.
"""

import triton
import triton.language as tl

from ..launch import kernel
from ..scalar_gate.inverse import unit_lower_inverse
from ..tiles import load_numbers, load_rows, locate, product, sequence, store_pairs, store_rows
from .decays import around_middle, in_order, load_decays, order, power


@triton.jit
def invert(inverse, pairs, head, token, t, valid, HV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a chunk's pairs, kept in `inverse`."""
    i = t[:, None]
    j = t[None, :]
    a = tl.where(i > j, pairs, 0.0)
    solved = unit_lower_inverse(a, i, j, C, PRECISION == "tf32", PRECISION).to(inverse.dtype.element_ty)
    store_pairs(inverse, token, head, solved, t, valid, HV, C)
    return solved


@triton.jit
def store_added_errors(
    added_errors, added_looks, pairs, solved, head, token, t, valid, HV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-inverse A of a chunk, and A where backward wants it."""
    a = tl.where(t[:, None] > t[None, :], pairs, 0.0).to(solved.dtype)
    if added_looks is not None:
        store_pairs(added_looks, token, head, a, t, valid, HV, C)
    store_pairs(added_errors, token, head, -product(solved, a, PRECISION), t, valid, HV, C)


@triton.jit
def near_pairs(
    q, k, columns, log_decay, weight, b, queries, decayed, writes, left, token, head, t, valid, scale,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, LOOKS: tl.constexpr,
    DECAYED: tl.constexpr, BY_CHANNEL: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, WIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What meets the columns, before any mask: reads and, with LOOKS, looks, [C, C] each; and whether the chunk is far.

    t: tokens in `order`. columns: keys, times b a token or BY_CHANNEL `weight`; decayed to the chunk's end they are `writes`. FIRST of
    the kinds of columns also makes queries and left, and with DECAYED x 2^G. q, k, columns: of their key head; left: of the chunk.
    """
    pairs = tl.zeros([C, C], tl.float32)
    look_pairs = tl.zeros([C, C], tl.float32)
    strayed = tl.zeros([1, BK], tl.int32)
    for start in range(0, DK, BK):
        at = start if DK % BK == 0 else 0  # in the address of a tile, so that those of its rows are not held from tile to tile
        channels = start - at + tl.arange(0, BK)
        x = load_decays(log_decay + at + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
        key = load_rows(k + at, token, t, valid, channels, H * DK, DK, BK)
        query = load_rows(q + at, token, t, valid, channels, H * DK, DK, BK)
        column = load_rows(columns + at, token, t, valid, channels, H * DK, DK, BK)
        factor = load_rows(weight + at + head * DK, token, t, valid, channels, HV * DK, DK, BK) if BY_CHANNEL else b[:, None]
        operand: tl.constexpr = query.dtype
        G, before, first, second, far = around_middle(x, REACH)
        strayed |= far.to(tl.int32)
        start_factor = power(first)
        end_factor = power(second)
        if DECAYED or LOOKS:
            looked = key.to(tl.float32) * power(before if LOOK_BEFORE else G)
            looker = in_order(looked).to(operand)
        if DECAYED:
            store_rows(decayed + at + head * DK, token, looked * start_factor, t, valid, channels, HV * DK, DK, BK)
        query = query.to(tl.float32) * power(before if READ_BEFORE else G)
        reader = in_order(query).to(operand)
        if FIRST:
            store_rows(queries + at + head * DK, token, query * (start_factor * scale), t, valid, channels, HV * DK, DK, BK)
            tl.store(left + at + channels[None, :], start_factor * end_factor, mask=(channels < DK)[None, :])
        column = column.to(tl.float32) * factor.to(tl.float32) * power(-G)
        writer = tl.trans(in_order(column).to(operand))
        store_rows(writes + at + head * DK, token, column * end_factor, t, valid, channels, HV * DK, DK, BK)
        pairs = tl.dot(reader, writer, acc=pairs, input_precision=PRECISION)
        if LOOKS:
            look_pairs = tl.dot(looker, writer, acc=look_pairs, input_precision=PRECISION)
    return pairs * scale, look_pairs, tl.max(strayed)


@kernel("N T scale weight_stride")
def prepare_kernel(
    q, k, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, added_looks, left, far,
    cu_seqlens, N, T, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    WEIGHTED: tl.constexpr, BY_CHANNEL: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program.

    q, k, p: [tokens, H, dk]; weight: [Hv], [tokens, Hv] or, BY_CHANNEL, [tokens, Hv, dk]. queries, looks, writes, added:
    [tokens, Hv, dk]. inverse, reads, added_reads, added_errors, added_looks (or None): [tokens, Hv, C]. left: [chunks, Hv, dk].
    far: [chunks, Hv], 1 for chunks that are left to `prepare_far_kernel`.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    place = slot.to(tl.int64) * HV + head
    if chunk * C >= length:
        tl.store(far + place, 0)
        return
    own = head // (HV // H) * DK
    ordered = order(C, BK)
    inside = chunk * C + ordered < length
    token = first + chunk * C
    b = load_numbers(weight, head, token, ordered, inside, weight_stride, 1.0, WEIGHTED and not BY_CHANNEL)
    pairs, look_pairs, strayed = near_pairs(
        q + own, k + own, k + own, log_decay, weight, b, queries, looks, writes, left + place * DK, token, head, ordered, inside, scale,
        H, HV, DK, BK, C, True, ERASE, ERASE, BY_CHANNEL, LOOK_BEFORE, READ_BEFORE, WIDE, PER_TOKEN, REACH, PRECISION,
    )  # fmt: skip
    tl.store(far + place, strayed)
    if strayed == 0:
        t = tl.arange(0, C)
        valid = chunk * C + t < length
        i = t[:, None]
        j = t[None, :]
        seen = i > j if READ_BEFORE else i >= j
        store_pairs(reads, token, head, tl.where(seen, pairs, 0.0), t, valid, HV, C)
        if ERASE:
            solved = invert(inverse, look_pairs, head, token, t, valid, HV, C, PRECISION)
            tl.debug_barrier()  # x 2^G, which other threads may have written
            for start in range(0, DK, BK):
                channels = start + tl.arange(0, BK)
                decayed = load_rows(looks + head * DK, token, t, valid, channels, HV * DK, DK, BK)
                store_rows(looks + head * DK, token, -product(solved, decayed, PRECISION), t, valid, channels, HV * DK, DK, BK)
        if ADDED:
            once = tl.full([C], 1.0, tl.float32)
            pairs, look_pairs, _strayed = near_pairs(
                q + own, k + own, p + own, log_decay, weight, once, queries, looks, added, left, token, head, ordered, inside, scale,
                H, HV, DK, BK, C, False, True, False, False, LOOK_BEFORE, READ_BEFORE, WIDE, PER_TOKEN, REACH, PRECISION,
            )  # fmt: skip
            store_pairs(added_reads, token, head, tl.where(seen, pairs, 0.0), t, valid, HV, C)
            store_added_errors(added_errors, added_looks, look_pairs, solved, head, token, t, valid, HV, C, PRECISION)
