"""The gradients of queries, keys and log decays; every chunk on its own, from the state before it and its gradient behind it.

With R and L the pairs of `pairs_kernel`, G the decays of the chunk summed (before the token for who looks or reads before it):

    dq_i = 2^G_i (scale S dO_i) + sum_j R_ij w_j 2^(G_i - G_j)          dx_i = -2^G_i (S dE_i) + sum_j L_ij w_j 2^(G_i - G_j)
    dw_j = 2^(whole - G_j) (D E_j) + sum_i 2^(G_i - G_j) (R_ij q_i + L_ij x_i)        dp likewise, with V in E's place

x looks and w writes. A channel's log decay at token t is felt by all that passes it: what reads and looks take from t on, and
what goes on behind the chunk, less what is written from t on,

    dlog_decay_t = <2^whole S, D> + sum_j w_j 2^(whole - G_j) D E_j + sum_(i >= t) (q_i dq_i + x_i dx_i - w_i dw_i)

(who looks or reads before the token: i > t). The pairs inside the chunk are in that sum twice, with opposite signs and the
same rounded factors, so that under a strong gate nothing is left of them.
"""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import load_numbers, load_rows, locate, sequence, store_rows
from .decays import STRIP, added_up, is_near, load_decays, middle_of, power, summed
from .rounds import decayed_pairs_gradient, load_pairs


@triton.jit
def load_transposed(base, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """A tile of a [dk, dv] state, [values, keys]."""
    return tl.load(base + keys[None, :] * DV + values[:, None], mask=(keys < DK)[None, :] & (values < DV)[:, None], other=0.0)


@triton.jit
def gradients_tile(
    x, q, k, w, p, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, dq, dk, dw, dp, dlog_decay,
    token, head, slot, t, valid, count, channels, b, scale,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, ADDED: tl.constexpr, TIED: tl.constexpr, LEARNED: tl.constexpr, LOOK_BEFORE: tl.constexpr,
    READ_BEFORE: tl.constexpr, WIDE: tl.constexpr, NEAR: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK key channels, with the log2 decays x, [C, BK]. Returns their part of the gradient of the weight, [C]. count: tokens there are."""
    i = t[:, None]
    j = t[None, :]
    STRIDE: tl.constexpr = HV * C
    own = head // (HV // H) * DK
    place = (token * HV + head) * C
    xq = tl.zeros([C, BK], tl.float32)
    xk = tl.zeros([C, BK], tl.float32)
    xw = tl.zeros([C, BK], tl.float32)
    xp = tl.zeros([C, BK], tl.float32)
    past = tl.zeros([BK], tl.float32)
    for start in range(0, DV, BV):
        values = start + tl.arange(0, BV)
        state = load_transposed(states + slot * DK * DV, channels, values, DK, DV)
        gradient = load_transposed(gradients + slot * DK * DV, channels, values, DK, DV)
        if LEARNED:
            past += tl.sum(state.to(tl.float32) * gradient.to(tl.float32), 0)
        xq = tl.dot(load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV), state, acc=xq, input_precision=PRECISION)
        xw = tl.dot(load_rows(error + head * DV, token, t, valid, values, HV * DV, DV, BV), gradient, acc=xw, input_precision=PRECISION)
        if ERASE:
            xk = tl.dot(load_rows(derror + head * DV, token, t, valid, values, HV * DV, DV, BV), state, acc=xk, input_precision=PRECISION)
        if ADDED:
            xp = tl.dot(load_rows(v + head * DV, token, t, valid, values, HV * DV, DV, BV), gradient, acc=xp, input_precision=PRECISION)

    query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
    operand: tl.constexpr = query.dtype
    query = query.to(tl.float32)
    if TIED or ERASE:
        key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
    if TIED:
        write = key * b[:, None]
    else:
        write = load_rows(w + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
    if ADDED:
        add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
    G, before, whole = summed(x, t, LOOK_BEFORE or READ_BEFORE, WIDE)
    read = before if READ_BEFORE else G
    look = before if LOOK_BEFORE else G
    hidden = tl.zeros([C, BK], tl.float32)  # what is taken that the token's own decay never saw
    if NEAR:
        middle = middle_of(G, t, C)
        back = power(middle)
        ahead = power(whole - middle)
        up = power(read - middle)
        down = power(middle - G)
        reader = (query * up).to(operand)
        writer = (write * down).to(operand)
        xw *= ahead
        ended = writer.to(tl.float32) * xw  # what goes on behind the chunk
        if ADDED:
            adder = (add * down).to(operand)
            xp *= ahead
            ended += adder.to(tl.float32) * xp
        behind = tl.sum(ended, 0)
        xq = tl.dot(load_pairs(reads + place, i, j, count, STRIDE), writer, acc=xq * (back * scale), input_precision=PRECISION)
        xw = tl.dot(load_pairs(reads + place, j, i, count, STRIDE), reader, acc=xw, input_precision=PRECISION)
        if ADDED:
            xq = tl.dot(load_pairs(added_reads + place, i, j, count, STRIDE), adder, acc=xq, input_precision=PRECISION)
            xp = tl.dot(load_pairs(added_reads + place, j, i, count, STRIDE), reader, acc=xp, input_precision=PRECISION)
        net = reader.to(tl.float32) * xq  # what is taken, less what is written
        if READ_BEFORE:
            hidden += net
        store_rows(dq + head * DK, token, xq * up, t, valid, channels, HV * DK, DK, BK)
        if ERASE:
            up = power(look - middle)
            looker = (key * up).to(operand)
            xk = tl.dot(load_pairs(looks + place, i, j, count, STRIDE), writer, acc=xk * -back, input_precision=PRECISION)
            xw = tl.dot(load_pairs(looks + place, j, i, count, STRIDE), looker, acc=xw, input_precision=PRECISION)
            if ADDED:
                xk = tl.dot(load_pairs(added_looks + place, i, j, count, STRIDE), adder, acc=xk, input_precision=PRECISION)
                xp = tl.dot(load_pairs(added_looks + place, j, i, count, STRIDE), looker, acc=xp, input_precision=PRECISION)
            looked = looker.to(tl.float32) * xk
            if LOOK_BEFORE:
                hidden += looked
            net += looked
            xk *= up
        net -= writer.to(tl.float32) * xw
        xw *= down
        if ADDED:
            net -= adder.to(tl.float32) * xp
            xp *= down
    else:
        xq *= power(read) * scale
        net = query * xq
        if READ_BEFORE:
            hidden += net
        if ERASE:
            xk *= -power(look)
            looked = key * xk
            if LOOK_BEFORE:
                hidden += looked
            net += looked
        ending = power(whole - G)
        xw *= ending
        ended = write * xw
        if ADDED:
            xp *= ending
            ended += add * xp
        behind = tl.sum(ended, 0)
        net -= ended
        dx, dy, taken, given = decayed_pairs_gradient(
            reads + place, query, write, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
        )  # fmt: skip
        xq += dx
        xw += dy
        net += taken - given
        if READ_BEFORE:
            hidden += taken
        if ERASE:
            dx, dy, taken, given = decayed_pairs_gradient(
                looks + place, key, write, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
            )  # fmt: skip
            xk += dx
            xw += dy
            net += taken - given
            if LOOK_BEFORE:
                hidden += taken
        if ADDED:
            dx, dy, taken, given = decayed_pairs_gradient(
                added_reads + place, query, add, read, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
            )  # fmt: skip
            xq += dx
            xp += dy
            net += taken - given
            if READ_BEFORE:
                hidden += taken
            dx, dy, taken, given = decayed_pairs_gradient(
                added_looks + place, key, add, look, G, t, count, operand, WIDE, ROUNDS, STRIDE, PRECISION
            )  # fmt: skip
            xk += dx
            xp += dy
            net += taken - given
            if LOOK_BEFORE:
                hidden += taken
        store_rows(dq + head * DK, token, xq, t, valid, channels, HV * DK, DK, BK)

    if LEARNED:
        later = added_up(t[:, None] <= t[None, :], net, tl.bfloat16 if operand == tl.bfloat16 else tl.float32)
        dg = later - hidden + (past * tl.reshape(power(whole), [BK]) + behind)[None, :]
        store_rows(dlog_decay + head * DK, token, dg, t, valid, channels, HV * DK, DK, BK)
    dweight = tl.sum(xw * key, 1) if TIED else tl.sum(xw, 1)
    if TIED:
        xk += b[:, None] * xw
    else:
        store_rows(dw + head * DK, token, xw, t, valid, channels, HV * DK, DK, BK)
    if TIED or ERASE:
        store_rows(dk + head * DK, token, xk, t, valid, channels, HV * DK, DK, BK)
    if ADDED:
        store_rows(dp + head * DK, token, xp, t, valid, channels, HV * DK, DK, BK)
    return dweight


@kernel("N T tokens scale decay_stride weight_stride")
def gradients_kernel(
    q, k, w, p, log_decay, weight, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks,
    dq, dk, dw, dp, dlog_decay, dweight, cu_seqlens, N, T, tokens, scale, decay_stride, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, ADDED: tl.constexpr, TIED: tl.constexpr, WEIGHTED: tl.constexpr, LEARNED: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr,
    ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, value head and tile of key channels a program. dq, dk, dw, dp: [tokens, Hv, dk].

    TIED: w is weight times k: dk has its gradient, too, and dweight, [tiles, tokens, Hv], a tile's part of that of weight.
    dlog_decay: [tokens, Hv, dk], with LEARNED.
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    count = length - chunk * C
    valid = t < count
    token = first + chunk * C
    slot = tl.program_id(0).to(tl.int64) * HV + head
    b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED)
    channels = tile * BK + tl.arange(0, BK)
    x = load_decays(log_decay + head * DK, token, t, valid, channels, decay_stride, DK, BK, WIDE)
    if is_near(x, t, C, REACH):
        own = gradients_tile(
            x, q, k, w, p, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, dq, dk, dw, dp, dlog_decay,
            token, head, slot, t, valid, count, channels, b, scale,
            H, HV, DK, DV, BK, BV, C, ERASE, ADDED, TIED, LEARNED, LOOK_BEFORE, READ_BEFORE, WIDE, True, ROUNDS, PRECISION,
        )  # fmt: skip
    else:
        own = tl.zeros([C], tl.float32)
        for strip in tl.range(tile * BK, (tile + 1) * BK, STRIP, disable_licm=True):
            few = strip + tl.arange(0, STRIP)
            y = load_decays(log_decay + head * DK, token, t, valid, few, decay_stride, DK, STRIP, WIDE)
            own += gradients_tile(
                y, q, k, w, p, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, dq, dk, dw, dp, dlog_decay,
                token, head, slot, t, valid, count, few, b, scale,
                H, HV, DK, DV, STRIP, BV, C, ERASE, ADDED, TIED, LEARNED, LOOK_BEFORE, READ_BEFORE, WIDE, False, ROUNDS, PRECISION,
            )  # fmt: skip
    if WEIGHTED and TIED:
        tl.store(dweight + tile * tokens.to(tl.int64) * HV + (token + t) * HV + head, own, mask=valid)
