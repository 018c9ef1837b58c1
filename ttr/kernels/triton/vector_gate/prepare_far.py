"""What `prepare` makes, of far chunks (`decays`): one kind of pairs after another, each in rounds, so that few tiles are held at once."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, locate, product, sequence, store_pairs, store_rows
from .decays import load_decays, load_weights, power, summed
from .prepare import invert, store_added_errors
from .rounds import ITEMS, decayed_pairs


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


@triton.jit
def far_pairs(
    rows, columns, log_decay, weight, head, token, t, valid, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BEFORE: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[C, C]: sum_k rows_ik columns_jk 2^(G_ik - G_jk) for i >= j, the columns times their weights; BEFORE: G before token i."""
    pairs = tl.zeros([C, C], tl.float32)
    for start in range(0, DK, BK):
        channels = start + tl.arange(0, BK)
        x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
        G, before, _whole = summed(x, t, BEFORE, WIDE)
        row = load_rows(rows, token, t, valid, channels, H * DK, DK, BK)
        column = load_rows(columns, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        column *= load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
        pairs = decayed_pairs(pairs, row.to(tl.float32), column, before, G, t, row.dtype, C, WIDE, ROUNDS, PRECISION)
    return pairs


@kernel("N T count scale weight_stride")
def prepare_far_kernel(
    q, k, p, log_decay, weight, inverse, queries, looks, writes, added, reads, added_reads, added_errors, added_looks, left, far,
    cu_seqlens, N, T, count, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr,
    WEIGHTED: tl.constexpr, BY_CHANNEL: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `prepare_kernel`; ITEMS of the count chunks of all heads a program."""
    begin = tl.program_id(0) * ITEMS
    items = begin + tl.arange(0, ITEMS)
    if tl.max(tl.load(far + items, mask=items < count, other=0), 0) == 0:
        return
    t = tl.arange(0, C)
    i = t[:, None]
    j = t[None, :]
    for step in range(0, ITEMS):
        item = begin + step
        if tl.load(far + item, mask=item < count, other=0) > 0:
            head = item % HV
            n, chunk = locate(cu_seqlens, item // HV, N, T, C, PACKED)
            first, length = sequence(cu_seqlens, n, T, PACKED)
            valid = chunk * C + t < length
            token = first + chunk * C
            own = head // (HV // H) * DK
            for start in range(0, DK, BK):
                channels = start + tl.arange(0, BK)
                x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
                G, before, whole = summed(x, t, READ_BEFORE, WIDE)
                tl.store(left + item.to(tl.int64) * DK + channels[None, :], power(whole), mask=(channels < DK)[None, :])
                x = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32) * scale * power(before)
                store_rows(queries + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)
                ending = power(whole - G)
                x = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32) * ending
                x *= load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
                store_rows(writes + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)
                if ADDED:
                    x = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32) * ending
                    store_rows(added + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)
            seen = i > j if READ_BEFORE else i >= j
            pairs = far_pairs(
                q + own, k + own, log_decay, weight, head, token, t, valid, weight_stride,
                H, HV, DK, BK, C, WEIGHTED, BY_CHANNEL, READ_BEFORE, WIDE, PER_TOKEN, ROUNDS, PRECISION,
            )  # fmt: skip
            store_pairs(reads, token, head, tl.where(seen, pairs * scale, 0.0), t, valid, HV, C)
            if ADDED:
                pairs = far_pairs(
                    q + own, p + own, log_decay, weight, head, token, t, valid, weight_stride,
                    H, HV, DK, BK, C, False, False, READ_BEFORE, WIDE, PER_TOKEN, ROUNDS, PRECISION,
                )  # fmt: skip
                store_pairs(added_reads, token, head, tl.where(seen, pairs * scale, 0.0), t, valid, HV, C)
            if ERASE:
                pairs = far_pairs(
                    k + own, k + own, log_decay, weight, head, token, t, valid, weight_stride,
                    H, HV, DK, BK, C, WEIGHTED, BY_CHANNEL, LOOK_BEFORE, WIDE, PER_TOKEN, ROUNDS, PRECISION,
                )  # fmt: skip
                solved = invert(inverse, pairs, head, token, t, valid, HV, C, PRECISION)
                if ADDED:
                    pairs = far_pairs(
                        k + own, p + own, log_decay, weight, head, token, t, valid, weight_stride,
                        H, HV, DK, BK, C, False, False, LOOK_BEFORE, WIDE, PER_TOKEN, ROUNDS, PRECISION,
                    )  # fmt: skip
                    store_added_errors(added_errors, added_looks, pairs, solved, head, token, t, valid, HV, C, PRECISION)
                store_looks(
                    looks, solved, k + own, log_decay, head, token, t, valid,
                    H, HV, DK, BK, LOOK_BEFORE, WIDE, PER_TOKEN, PRECISION,
                )  # fmt: skip
