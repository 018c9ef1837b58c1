"""All that a scan over chunks takes of a chunk's keys, queries and decays; every chunk on its own.

With x the keys as they look and w as they write, G the decays of a chunk summed, before the token itself for who looks or
reads before it:

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
from .rounds import ITEMS, decayed_pairs


@triton.jit
def prepare_chunk(
    q, k, w, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, far,
    slot, head, first, chunk, length, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    TIED: tl.constexpr, WEIGHTED: tl.constexpr, SOLVED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, NEAR: tl.constexpr, REACH: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head, BK key channels at a time. NEAR: it says to `far` whether it is none, and leaves it then."""
    LOOKS: tl.constexpr = ERASE and not SOLVED
    own = head // (HV // H) * DK
    place = slot.to(tl.int64) * HV + head
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    i = t[:, None]
    j = t[None, :]
    b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED)
    pairs = tl.zeros([C, C], tl.float32)
    look_pairs = tl.zeros([C, C], tl.float32)
    added_pairs = tl.zeros([C, C], tl.float32)
    added_looks = tl.zeros([C, C], tl.float32)
    strayed = 0
    for start in range(0, DK, BK):
        channels = start + tl.arange(0, BK)
        x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
        if NEAR:
            strayed = tl.maximum(strayed, is_far(x, t, C, REACH))
            x = tl.where(strayed > 0, 0.0, x)  # what comes of it is not used
        G, before, whole = summed(x, t, LOOK_BEFORE or READ_BEFORE, WIDE)
        read = before if READ_BEFORE else G
        look = before if LOOK_BEFORE else G
        tl.store(left + place * DK + channels[None, :], power(whole), mask=(channels < DK)[None, :])
        query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
        operand: tl.constexpr = query.dtype
        query = query.to(tl.float32) * scale
        if TIED or LOOKS or ADDED:
            key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        if TIED:
            write = key * b[:, None]
        else:
            write = load_rows(w + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
        if ADDED:
            add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        if NEAR:
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
        else:
            pairs += decayed_pairs(query, write, read, G, t, operand, C, WIDE, ROUNDS, PRECISION)
            if LOOKS:
                look_pairs += decayed_pairs(key, write, look, G, t, operand, C, WIDE, ROUNDS, PRECISION)
            if ADDED:
                added_pairs += decayed_pairs(query, add, read, G, t, operand, C, WIDE, ROUNDS, PRECISION)
                added_looks += decayed_pairs(key, add, look, G, t, operand, C, WIDE, ROUNDS, PRECISION)
            start_factor = power(read)
            end_factor = power(whole - G)
        store_rows(queries + head * DK, token, query * start_factor, t, valid, channels, HV * DK, DK, BK)
        store_rows(writes + head * DK, token, write * end_factor, t, valid, channels, HV * DK, DK, BK)
        if ADDED:
            store_rows(added + head * DK, token, add * end_factor, t, valid, channels, HV * DK, DK, BK)
    if NEAR:
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
                a = tl.where(i > j, look_pairs, 0.0)
                solved = unit_lower_inverse(a, i, j, C, PRECISION == "tf32", PRECISION).to(inverse.dtype.element_ty)
                store_pairs(inverse, token, head, solved, t, valid, HV, C)
            if ADDED:
                a = tl.where(i > j, added_looks, 0.0)
                if not SOLVED:
                    a = -product(solved, a.to(solved.dtype), PRECISION)
                store_pairs(added_errors, token, head, a, t, valid, HV, C)
            for start in range(0, DK, BK):
                channels = start + tl.arange(0, BK)
                key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
                x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
                G, before, _whole = summed(x, t, LOOK_BEFORE, WIDE)
                decayed = (key.to(tl.float32) * power(before if LOOK_BEFORE else G)).to(key.dtype)
                store_rows(looks + head * DK, token, -product(solved, decayed, PRECISION), t, valid, channels, HV * DK, DK, BK)


@kernel("N T scale weight_stride")
def prepare_kernel(
    q, k, w, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, far, cu_seqlens,
    N, T, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    TIED: tl.constexpr, WEIGHTED: tl.constexpr, SOLVED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program.

    q, k, p: [tokens, H, dk]; w: [tokens, Hv, dk], or weight times k where TIED. queries, looks, writes, added: [tokens, Hv, dk].
    inverse, reads, added_reads, added_errors: [tokens, Hv, C]; SOLVED: inverse is there. left: [chunks, Hv, dk].
    far: [chunks, Hv], 1 for chunks that are left to `prepare_far_kernel`.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        tl.store(far + slot.to(tl.int64) * HV + head, 0)
        return
    prepare_chunk(
        q, k, w, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, far,
        slot, head, first, chunk, length, scale, weight_stride,
        H, HV, DK, BK, C, ERASE, ADDED, TIED, WEIGHTED, SOLVED, LOOK_BEFORE, READ_BEFORE, WIDE, PER_TOKEN, True, REACH, 0, PRECISION,
    )  # fmt: skip


@kernel("N T count scale weight_stride")
def prepare_far_kernel(
    q, k, w, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, far, cu_seqlens,
    N, T, count, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    TIED: tl.constexpr, WEIGHTED: tl.constexpr, SOLVED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of far chunks; ITEMS of the count chunks of all heads a program."""
    begin = tl.program_id(0) * ITEMS
    items = begin + tl.arange(0, ITEMS)
    if tl.max(tl.load(far + items, mask=items < count, other=0), 0) > 0:
        for step in range(0, ITEMS):
            item = begin + step
            if tl.load(far + item, mask=item < count, other=0) > 0:
                slot = item // HV
                head = item % HV
                n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
                first, length = sequence(cu_seqlens, n, T, PACKED)
                prepare_chunk(
                    q, k, w, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, far,
                    slot, head, first, chunk, length, scale, weight_stride,
                    H, HV, DK, BK, C, ERASE, ADDED, TIED, WEIGHTED, SOLVED, LOOK_BEFORE, READ_BEFORE, WIDE, PER_TOKEN, False, 0.0,
                    ROUNDS, PRECISION,
                )  # fmt: skip
