"""The gradients of queries, keys and log decays in far chunks (`decays`): what `gradients` says, with the pairs in rounds."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_rows, locate, sequence, store_rows
from .decays import load_decays, load_weights, power, summed
from .gradients import passing, store_decay_gradient, through_state
from .rounds import ITEMS, columns_gradient, rows_gradient


@kernel("N T tokens number scale weight_stride")
def gradients_far_kernel(
    q, k, p, log_decay, weight, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, value_left, far,
    dq, dk, dp, dlog_decay, dweight, cu_seqlens, N, T, tokens, number, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, ERASE: tl.constexpr, ADDED: tl.constexpr, WEIGHTED: tl.constexpr, BY_CHANNEL: tl.constexpr, LEARNED: tl.constexpr,
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
    for step in tl.range(0, ITEMS, disable_licm=True):  # nothing of one chunk is worth a register for the next
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
            values_left = value_left if value_left is None else value_left + item.to(tl.int64) * DV
            db = tl.zeros([C], tl.float32)
            for start in range(tile * TILE, tl.minimum((tile + 1) * TILE, DK), BK):
                channels = start + tl.arange(0, BK)
                x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
                G, before, whole = summed(x, t, LOOK_BEFORE or READ_BEFORE, WIDE)
                read = before if READ_BEFORE else G
                look = before if LOOK_BEFORE else G
                net = tl.zeros([C, BK], tl.float32)  # by token, what is taken less what is written
                hidden = tl.zeros([C, BK], tl.float32)  # what is taken that the token's own decay never saw

                query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
                operand: tl.constexpr = query.dtype
                query = query.to(tl.float32)
                write = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                write *= load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
                x = through_state(do + head * DV, before_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION)
                x *= power(read) * scale
                taken = query * x
                x, taken = rows_gradient(x, taken, reads + place, query, write, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION)
                if ADDED:
                    add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                    x, taken = rows_gradient(
                        x, taken, added_reads + place, query, add, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )  # fmt: skip
                if READ_BEFORE:
                    hidden += taken
                else:
                    net += taken
                store_rows(dq + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)

                x = through_state(error + head * DV, behind_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION)
                x *= power(whole - G)
                onward = tl.sum(write * x, 0)[None, :]
                net -= write * x
                x, net = columns_gradient(x, net, reads + place, query, write, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION)
                key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                if ERASE:
                    x, net = columns_gradient(
                        x, net, looks + place, key, write, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )
                if BY_CHANNEL:
                    store_rows(dweight + head * DK, token, key * x, t, valid, channels, HV * DK, DK, BK)
                elif WEIGHTED:
                    db += tl.sum(key * x, 1)
                x *= load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
                if ERASE:
                    y = through_state(derror + head * DV, before_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION)
                    y *= -power(look)
                    x += y
                    taken = key * y
                    x, taken = rows_gradient(
                        x, taken, looks + place, key, write, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )
                    if ADDED:
                        add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                        x, taken = rows_gradient(
                            x, taken, added_looks + place, key, add, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                        )  # fmt: skip
                    if LOOK_BEFORE:
                        hidden += taken
                    else:
                        net += taken
                store_rows(dk + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)

                if ADDED:
                    query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                    key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                    add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
                    x = through_state(v + head * DV, behind_it, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION)
                    x *= power(whole - G)
                    onward += tl.sum(add * x, 0)[None, :]
                    net -= add * x
                    x, net = columns_gradient(
                        x, net, added_reads + place, query, add, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )  # fmt: skip
                    x, net = columns_gradient(
                        x, net, added_looks + place, key, add, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
                    )  # fmt: skip
                    store_rows(dp + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)
                if LEARNED:
                    onward += passing(before_it, behind_it, values_left, channels, DK, DV, BK) * power(whole)
                    store_decay_gradient(dlog_decay + head * DK, token, t, valid, channels, net + hidden, onward - hidden, operand, HV, DK)
            if WEIGHTED and not BY_CHANNEL:
                tl.store(dweight + tile * tokens.to(tl.int64) * HV + (token + t) * HV + head, db, mask=valid)
