"""All that a scan over chunks takes of a chunk's keys, queries and decays; every chunk on its own.

With x the keys as they look and w as they write, G the decays of a chunk summed, before the token itself for who looks or
reads before it:

    queries = scale q 2^G         writes = w 2^(whole - G)                    left = 2^whole
    reads_ij = scale sum_k q_ik w_jk 2^(G_ik - G_jk), i >= j
    A_ij = sum_k x_ik w_jk 2^(G_ik - G_jk), i > j       inverse = (I + A)^-1       looks = -inverse (x 2^G)

What is written of the values as they are, with keys p of its own (ADDED), likewise: added and added_reads of p instead of w,
and added_errors = -inverse A of p, the part of the errors that comes of it.
"""

import triton.language as tl

from ..launch import kernel
from ..scalar_gate.inverse import unit_lower_inverse
from ..tiles import factor, load_numbers, load_rows, locate, product, sequence, store_pairs, store_rows
from .decays import load_summed, meeting, met, rounds_of, towards


@kernel("N T scale decay_stride weight_stride")
def prepare_kernel(
    q, k, w, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, left, cu_seqlens,
    N, T, scale, decay_stride, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    TIED: tl.constexpr, WEIGHTED: tl.constexpr, SOLVED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program, BK key channels at a time.

    q, k, p: [tokens, H, dk]; w: [tokens, Hv, dk], or weight times k where TIED. queries, looks, writes, added: [tokens, Hv, dk].
    inverse, reads, added_reads, added_errors: [tokens, Hv, C]; SOLVED: inverse is there. left: [chunks, Hv, dk].
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    own = head // (HV // H) * DK
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
    for start in range(0, DK, BK):
        channels = start + tl.arange(0, BK)
        query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
        operand = query.dtype
        query = query.to(tl.float32) * scale
        key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        if TIED:
            write = key * b[:, None]
        else:
            write = load_rows(w + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
        G, before, whole = load_summed(log_decay + head * DK, token, t, valid, channels, decay_stride, DK, BK, WIDE)
        read = before if READ_BEFORE else G
        look = before if LOOK_BEFORE else G
        ending = factor(whole[None, :] - G)
        store_rows(queries + head * DK, token, query * factor(read), t, valid, channels, HV * DK, DK, BK)
        store_rows(writes + head * DK, token, write * ending, t, valid, channels, HV * DK, DK, BK)
        tl.store(left + (tl.program_id(0).to(tl.int64) * HV + head) * DK + channels, factor(whole), mask=channels < DK)
        if ADDED:
            add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
            store_rows(added + head * DK, token, add * ending, t, valid, channels, HV * DK, DK, BK)
        rounds, near = rounds_of(G, whole, t, C, REACH)
        for round in range(0, rounds):
            at = meeting(G, round, near, t, C)
            down = towards(at - G, near, REACH)
            reader = (query * towards(read - at, near, REACH)).to(operand)
            writer = tl.trans((write * down).to(operand))
            seen = met(round, near, i, j, C, READ_BEFORE)
            pairs += tl.where(seen, product(reader, writer, PRECISION), 0.0)
            if (ERASE and not SOLVED) or ADDED:
                looker = (key * towards(look - at, near, REACH)).to(operand)
                looked = met(round, near, i, j, C, True)
            if ERASE and not SOLVED:
                look_pairs += tl.where(looked, product(looker, writer, PRECISION), 0.0)
            if ADDED:
                adder = tl.trans((add * down).to(operand))
                added_pairs += tl.where(seen, product(reader, adder, PRECISION), 0.0)
                added_looks += tl.where(looked, product(looker, adder, PRECISION), 0.0)
    store_pairs(reads, token, head, pairs, t, valid, HV, C)
    if ADDED:
        store_pairs(added_reads, token, head, added_pairs, t, valid, HV, C)
    if ERASE:
        if SOLVED:
            solved = load_rows(inverse + head * C, token, t, valid, t, HV * C, C, C)
        else:
            solved = unit_lower_inverse(look_pairs, i, j, C, PRECISION == "tf32", PRECISION).to(inverse.dtype.element_ty)
            store_pairs(inverse, token, head, solved, t, valid, HV, C)
        if ADDED:
            store_pairs(added_errors, token, head, -product(solved, added_looks.to(solved.dtype), PRECISION), t, valid, HV, C)
        for start in range(0, DK, BK):
            channels = start + tl.arange(0, BK)
            key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
            G, before, whole = load_summed(log_decay + head * DK, token, t, valid, channels, decay_stride, DK, BK, WIDE)
            look = before if LOOK_BEFORE else G
            decayed = (key.to(tl.float32) * factor(look)).to(key.dtype)
            store_rows(looks + head * DK, token, -product(solved, decayed, PRECISION), t, valid, channels, HV * DK, DK, BK)
