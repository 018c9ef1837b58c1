"""All that a scan over chunks takes of a chunk's keys, queries and decays; every chunk on its own.

With x the keys as they look, w as they write, times their weights, and G the decays of a chunk summed, before the token itself for
who looks or reads before it:

    queries = scale q 2^G         writes = w 2^(whole - G)                    left = 2^whole
    reads_ij = scale sum_k q_ik w_jk 2^(G_ik - G_jk), i >= j
    A_ij = sum_k x_ik w_jk 2^(G_ik - G_jk), i > j       inverse = (I + A)^-1       looks = -inverse (x 2^G)

What is written of the values as they are, with keys p of its own (ADDED), likewise: added and added_reads of p instead of w,
and added_errors = -inverse A of p, the part of the errors that comes of it, or where inverse is there already (SOLVED), for
backward, A of p itself.
"""

import triton
import triton.language as tl

from ..launch import kernel
from ..scalar_gate.inverse import unit_lower_inverse
from ..tiles import load_numbers, load_rows, locate, product, sequence, store_pairs, store_rows
from .decays import is_far, load_decays, middle_of, power, summed


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
    added_errors, pairs, solved, head, token, t, valid, HV: tl.constexpr, C: tl.constexpr, SOLVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-inverse A of a chunk, or where it is SOLVED already, A."""
    a = tl.where(t[:, None] > t[None, :], pairs, 0.0)
    if not SOLVED:
        a = -product(solved, a.to(solved.dtype), PRECISION)
    store_pairs(added_errors, token, head, a, t, valid, HV, C)


@triton.jit
def store_looks(
    looks, solved, k, log_decay, head, token, t, valid,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, LOOK_BEFORE: tl.constexpr, WIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-inverse (x 2^G) of a chunk. k: of its key head."""
    for start in range(0, DK, BK):
        channels = start + tl.arange(0, BK)
        key = load_rows(k, token, t, valid, channels, H * DK, DK, BK)
        x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
        G, before, _whole = summed(x, t, LOOK_BEFORE, WIDE)
        decayed = (key.to(tl.float32) * power(before if LOOK_BEFORE else G)).to(key.dtype)
        store_rows(looks + head * DK, token, -product(solved, decayed, PRECISION), t, valid, channels, HV * DK, DK, BK)


@kernel("N T scale weight_stride")
def prepare_kernel(
    q, k, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, far, cu_seqlens,
    N, T, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    WEIGHTED: tl.constexpr, BY_CHANNEL: tl.constexpr, SOLVED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program.

    q, k, p: [tokens, H, dk]; weight: [Hv], [tokens, Hv] or, BY_CHANNEL, [tokens, Hv, dk]. queries, looks, writes, added:
    [tokens, Hv, dk]. inverse, reads, added_reads, added_errors: [tokens, Hv, C]; SOLVED: inverse is there. left: [chunks, Hv, dk].
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
    LOOKS: tl.constexpr = ERASE and not SOLVED
    own = head // (HV // H) * DK
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    i = t[:, None]
    j = t[None, :]
    b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED and not BY_CHANNEL)
    pairs = tl.zeros([C, C], tl.float32)
    look_pairs = tl.zeros([C, C], tl.float32)
    added_pairs = tl.zeros([C, C], tl.float32)
    added_looks = tl.zeros([C, C], tl.float32)
    strayed = 0
    for start in range(0, DK, BK):
        channels = start + tl.arange(0, BK)
        x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
        strayed = tl.maximum(strayed, is_far(x, t, C, REACH))
        x = tl.where(strayed > 0, 0.0, x)  # what comes of it is not used
        G, before, whole = summed(x, t, LOOK_BEFORE or READ_BEFORE, WIDE)
        read = before if READ_BEFORE else G
        look = before if LOOK_BEFORE else G
        tl.store(left + place * DK + channels[None, :], power(whole), mask=(channels < DK)[None, :])
        query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
        operand: tl.constexpr = query.dtype
        query = query.to(tl.float32) * scale
        key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        if BY_CHANNEL:
            write = key * load_rows(weight + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
        else:
            write = key * b[:, None]
        if ADDED:
            add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        middle = middle_of(G, t, C)
        down = power(middle - G)
        query *= power(read - middle)
        write *= down
        reader = query.to(operand)
        writer = tl.trans(write.to(operand))
        pairs = tl.dot(reader, writer, acc=pairs, input_precision=PRECISION)
        if LOOKS or ADDED:
            looker = (key * power(look - middle)).to(operand)
        if LOOKS:
            look_pairs = tl.dot(looker, writer, acc=look_pairs, input_precision=PRECISION)
        if ADDED:
            add *= down
            adder = tl.trans(add.to(operand))
            added_pairs = tl.dot(reader, adder, acc=added_pairs, input_precision=PRECISION)
            added_looks = tl.dot(looker, adder, acc=added_looks, input_precision=PRECISION)
        start_factor = power(middle)
        end_factor = power(whole - middle)
        store_rows(queries + head * DK, token, query * start_factor, t, valid, channels, HV * DK, DK, BK)
        store_rows(writes + head * DK, token, write * end_factor, t, valid, channels, HV * DK, DK, BK)
        if ADDED:
            store_rows(added + head * DK, token, add * end_factor, t, valid, channels, HV * DK, DK, BK)
    tl.store(far + place, strayed)
    if strayed == 0:
        seen = i > j if READ_BEFORE else i >= j
        store_pairs(reads, token, head, tl.where(seen, pairs, 0.0), t, valid, HV, C)
        if ADDED:
            store_pairs(added_reads, token, head, tl.where(seen, added_pairs, 0.0), t, valid, HV, C)
        if ERASE:
            if SOLVED:
                solved = load_rows(inverse + head * C, token, t, valid, t, HV * C, C, C)
            else:
                solved = invert(inverse, look_pairs, head, token, t, valid, HV, C, PRECISION)
            if ADDED:
                store_added_errors(added_errors, added_looks, solved, head, token, t, valid, HV, C, SOLVED, PRECISION)
            store_looks(
                looks, solved, k + own, log_decay, head, token, t, valid,
                H, HV, DK, BK, LOOK_BEFORE, WIDE, PER_TOKEN, PRECISION,
            )  # fmt: skip
