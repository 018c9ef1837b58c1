"""The gradients of queries, keys and log decays in far chunks (`decays`): what `gradients` says, with the pairs in rounds."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_numbers, load_rows, locate, sequence, store_rows
from .decays import load_decays, power, summed
from .gradients import passing, store_decay_gradient, through_state
from .rounds import ITEMS, decayed_pairs_gradient


@kernel("N T tokens number scale weight_stride")
def gradients_far_kernel(
    q, k, w, p, log_decay, weight, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, far,
    dq, dk, dw, dp, dlog_decay, dweight, cu_seqlens, N, T, tokens, number, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr, TIED: tl.constexpr, WEIGHTED: tl.constexpr, LEARNED: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ITEMS of the `number` chunks of all heads, and a tile of TILE key channels, a program; BK of them at a time."""
    begin = tl.program_id(0) * ITEMS
    tile = tl.program_id(1)
    items = begin + tl.arange(0, ITEMS)
    if tl.max(tl.load(far + items, mask=items < number, other=0), 0) == 0:
        return
    STRIDE: tl.constexpr = HV * C
    t = tl.arange(0, C)
    for step in range(0, ITEMS):
        item = begin + step
        if tl.load(far + item, mask=item < number, other=0) > 0:
            n, chunk = locate(cu_seqlens, item // HV, N, T, C, PACKED)
            head = item % HV
            first, length = sequence(cu_seqlens, n, T, PACKED)
            count = length - chunk * C
            valid = t < count
            token = first + chunk * C
            own = head // (HV // H) * DK
            place = (token * HV + head) * C
            before_it = states + item.to(tl.int64) * DK * DV
            behind_it = gradients + item.to(tl.int64) * DK * DV
            b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED)
            db = tl.zeros([C], tl.float32)
            for start in range(tile * TILE, (tile + 1) * TILE, BK):
                channels = start + tl.arange(0, BK)
                x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
                G, before, whole = summed(x, t, LOOK_BEFORE or READ_BEFORE, WIDE)
                read = before if READ_BEFORE else G
                look = before if LOOK_BEFORE else G
                ending = power(whole - G)
                query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
                operand: tl.constexpr = query.dtype
                query = query.to(tl.float32)
                if TIED or ERASE:
                    key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                if TIED:
                    write = key * b[:, None]
                else:
                    write = load_rows(w + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
                x = through_state(error + head * DV, behind_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION) * ending
                dw_ = x
                ended = write * x
                x = through_state(do + head * DV, before_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION)
                x *= power(read) * scale
                dx, dy, taken, given = decayed_pairs_gradient(
                    reads + place, query, write, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                )  # fmt: skip
                dq_ = x + dx
                dw_ += dy
                net = query * x + taken - given
                hidden = tl.zeros([C, BK], tl.float32)
                if READ_BEFORE:
                    hidden += query * x + taken
                if ADDED:
                    add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                    x = through_state(v + head * DV, behind_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION) * ending
                    dp_ = x
                    ended += add * x
                    dx, dy, taken, given = decayed_pairs_gradient(
                        added_reads + place, query, add, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )  # fmt: skip
                    dq_ += dx
                    dp_ += dy
                    net += taken - given
                    if READ_BEFORE:
                        hidden += taken
                store_rows(dq + head * DK, token, dq_, t, valid, channels, HV * DK, DK, BK)
                dk_ = tl.zeros([C, BK], tl.float32)
                if ERASE:
                    x = through_state(derror + head * DV, before_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION)
                    x *= -power(look)
                    dx, dy, taken, given = decayed_pairs_gradient(
                        looks + place, key, write, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )  # fmt: skip
                    dk_ = x + dx
                    dw_ += dy
                    net += key * x + taken - given
                    if LOOK_BEFORE:
                        hidden += key * x + taken
                if ADDED:
                    dx, dy, taken, given = decayed_pairs_gradient(
                        added_looks + place, key, add, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )  # fmt: skip
                    dk_ += dx
                    dp_ += dy
                    net += taken - given
                    if LOOK_BEFORE:
                        hidden += taken
                    store_rows(dp + head * DK, token, dp_, t, valid, channels, HV * DK, DK, BK)
                if TIED:
                    db += tl.sum(key * dw_, 1)
                    dk_ += b[:, None] * dw_
                else:
                    store_rows(dw + head * DK, token, dw_, t, valid, channels, HV * DK, DK, BK)
                if TIED or ERASE:
                    store_rows(dk + head * DK, token, dk_, t, valid, channels, HV * DK, DK, BK)
                if LEARNED:
                    onward = passing(before_it, behind_it, channels, DK, DV, BK) * power(whole) + tl.sum(ended, 0)[None, :]
                    net -= ended
                    store_decay_gradient(dlog_decay + head * DK, token, t, valid, channels, net, hidden, onward, operand, HV, DK)
            if WEIGHTED and TIED:
                tl.store(dweight + tile * tokens.to(tl.int64) * HV + (token + t) * HV + head, db, mask=valid)
