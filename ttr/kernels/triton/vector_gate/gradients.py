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
from ..tiles import factor, load_numbers, load_rows, locate, product, sequence, states_of, store_rows, tokens_of
from .decays import load_summed, meeting, met, rounds_of, towards


@triton.jit
def load_pairs(base, token, reader, writer, seen, stride):
    """Pairs of one head of a chunk, [reader, writer] or, with the two broadcast the other way about, transposed; zero where not seen."""
    return tl.load(base + token * stride + reader * stride + writer, mask=seen, other=0.0)


@kernel("N T count tokens scale decay_stride weight_stride")
def gradients_kernel(
    q, k, w, p, log_decay, weight, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks,
    dq, dk, dw, dp, dlog_decay, dweight, cu_seqlens, N, T, count, tokens, scale, decay_stride, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, ADDED: tl.constexpr, TIED: tl.constexpr, WEIGHTED: tl.constexpr, LEARNED: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr,
    PRECISION: tl.constexpr,
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
    own = head // (HV // H) * DK
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    row = chunk * C
    i = t[:, None]
    j = t[None, :]
    channels = tile * BK + tl.arange(0, BK)

    # the products with the state and its gradient
    outs = tokens_of(do, first, head, length, HV, DV, C, BV)
    errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    starts = states_of(states, count, DK, DV, BK, BV)
    ends = states_of(gradients, count, DK, DV, BK, BV)
    if ERASE:
        derrors = tokens_of(derror, first, head, length, HV, DV, C, BV)
    if ADDED:
        values_ = tokens_of(v, first, head, length, HV, DV, C, BV)
    xq = tl.zeros([C, BK], tl.float32)
    xk = tl.zeros([C, BK], tl.float32)
    xw = tl.zeros([C, BK], tl.float32)
    xp = tl.zeros([C, BK], tl.float32)
    past = tl.zeros([BK], tl.float32)
    slot = tl.program_id(0) * HV + head
    for start in range(0, DV, BV):
        state = tl.reshape(starts.load([slot, tile * BK, start]), [BK, BV])
        gradient = tl.reshape(ends.load([slot, tile * BK, start]), [BK, BV])
        xq = tl.dot(outs.load([row, start]), tl.trans(state), acc=xq, input_precision=PRECISION)
        xw = tl.dot(errors.load([row, start]), tl.trans(gradient), acc=xw, input_precision=PRECISION)
        if ERASE:
            xk = tl.dot(derrors.load([row, start]), tl.trans(state), acc=xk, input_precision=PRECISION)
        if ADDED:
            xp = tl.dot(values_.load([row, start]), tl.trans(gradient), acc=xp, input_precision=PRECISION)
        if LEARNED:
            past += tl.sum(state.to(tl.float32) * gradient.to(tl.float32), 1)

    b = load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED)
    query = load_rows(q + own, token, t, valid, channels, H * DK, DK, BK)
    key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
    operand = query.dtype
    if TIED:
        write = key.to(tl.float32) * b[:, None]
    else:
        write = load_rows(w + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
    G, before, whole = load_summed(log_decay + head * DK, token, t, valid, channels, decay_stride, DK, BK, WIDE)
    read = before if READ_BEFORE else G
    look = before if LOOK_BEFORE else G
    ending = factor(whole[None, :] - G)
    xq *= factor(read) * scale
    xw *= ending
    net = query.to(tl.float32) * xq  # what is read and looked at, less what is written
    hidden = tl.zeros([C, BK], tl.float32)  # of that, what the token's own decay never saw
    leaving = write * xw
    if READ_BEFORE:
        hidden += net
    if ERASE:
        xk *= -factor(look)
        net += key.to(tl.float32) * xk
        if LOOK_BEFORE:
            hidden += key.to(tl.float32) * xk
    if ADDED:
        add = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
        xp *= ending
        leaving += add * xp

    # the pairs inside the chunk
    pairs = head * C
    stride = HV * C
    rounds, near = rounds_of(G, whole, t, C, REACH)
    for round in range(0, rounds):
        at = meeting(G, round, near, t, C)
        down = towards(at - G, near, REACH)
        up = towards(read - at, near, REACH)
        reader = (query.to(tl.float32) * up).to(operand)
        writer = (write * down).to(operand)
        seen = met(round, near, i, j, C, READ_BEFORE)
        seen_by = met(round, near, j, i, C, READ_BEFORE)  # row: who wrote, column: who reads
        x = product(load_pairs(reads + pairs, token, i, j, valid[:, None] & seen, stride), writer, PRECISION)
        y = product(load_pairs(reads + pairs, token, j, i, valid[None, :] & seen_by, stride), reader, PRECISION)
        if ADDED:
            adder = (add * down).to(operand)
            x = tl.dot(load_pairs(added_reads + pairs, token, i, j, valid[:, None] & seen, stride), adder, acc=x, input_precision=PRECISION)
            z = product(load_pairs(added_reads + pairs, token, j, i, valid[None, :] & seen_by, stride), reader, PRECISION)
        xq += up * x
        taken = reader.to(tl.float32) * x
        if READ_BEFORE:
            hidden += taken
        if ERASE:
            up = towards(look - at, near, REACH)
            looker = (key.to(tl.float32) * up).to(operand)
            looked = met(round, near, i, j, C, True)
            looked_by = met(round, near, j, i, C, True)
            x = product(load_pairs(looks + pairs, token, i, j, valid[:, None] & looked, stride), writer, PRECISION)
            y = tl.dot(load_pairs(looks + pairs, token, j, i, valid[None, :] & looked_by, stride), looker, acc=y, input_precision=PRECISION)
            if ADDED:
                x = tl.dot(
                    load_pairs(added_looks + pairs, token, i, j, valid[:, None] & looked, stride), adder, acc=x, input_precision=PRECISION
                )
                z = tl.dot(
                    load_pairs(added_looks + pairs, token, j, i, valid[None, :] & looked_by, stride),
                    looker,
                    acc=z,
                    input_precision=PRECISION,
                )
            xk += up * x
            taken += looker.to(tl.float32) * x
            if LOOK_BEFORE:
                hidden += looker.to(tl.float32) * x
        xw += down * y
        net += taken - writer.to(tl.float32) * y
        if ADDED:
            xp += down * z
            net -= adder.to(tl.float32) * z

    store_rows(dq + head * DK, token, xq, t, valid, channels, HV * DK, DK, BK)
    if LEARNED:
        dg = tl.cumsum(net, 0, reverse=True) - hidden + tl.cumsum(leaving, 0) - leaving + (past * factor(whole))[None, :]
        store_rows(dlog_decay + head * DK, token, dg, t, valid, channels, HV * DK, DK, BK)
    if TIED:
        if WEIGHTED:
            at_token = tile * tokens.to(tl.int64) * HV + (token + t) * HV + head
            tl.store(dweight + at_token, tl.sum(key.to(tl.float32) * xw, 1), mask=valid)
        xk += b[:, None] * xw
    else:
        store_rows(dw + head * DK, token, xw, t, valid, channels, HV * DK, DK, BK)
    if TIED or ERASE:
        store_rows(dk + head * DK, token, xk, t, valid, channels, HV * DK, DK, BK)
    if ADDED:
        store_rows(dp + head * DK, token, xp, t, valid, channels, HV * DK, DK, BK)
