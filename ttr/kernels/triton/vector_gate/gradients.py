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
from ..tiles import load_block, load_rows, locate, sequence, store_rows
from .decays import added_up, from_middle, halves, load_decays, load_weights, power
from .rounds import load_pairs


@triton.jit
def through_state(
    rows, states, token, t, valid, channels, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """rows, [tokens, Hv, dv] of one head, times the transpose of a state [dk, dv]: [C, BK]."""
    x = tl.zeros([t.shape[0], BK], tl.float32)
    for start in range(0, DV, BV):
        values = start + tl.arange(0, BV)
        state = load_transposed(states, channels, values, DK, DV)
        x = tl.dot(load_rows(rows, token, t, valid, values, HV * DV, DV, BV), state, acc=x, input_precision=PRECISION)
    return x


@triton.jit
def load_transposed(base, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """A tile of a [dk, dv] state, [values, keys]."""
    return tl.load(base + keys[None, :] * DV + values[:, None], mask=(keys < DK)[None, :] & (values < DV)[:, None], other=0.0)


@triton.jit
def passing(states, gradients, value_left, channels, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr):
    """<S value_left, D> over the values, [1, BK], without value_left if None. Not in the loop of `through_state`, which loads D too:
    Triton 3.6 overwrites an operand there that is read otherwise as well (tests/kernels/triton/ttgir.py)."""
    total = tl.zeros([BK, 64], tl.float32)
    for start in range(0, DV, 64):
        values = start + tl.arange(0, 64)
        state = load_block(states, channels, values, DK, DV).to(tl.float32)
        if value_left is not None:
            state *= tl.load(value_left + values, mask=values < DV, other=0.0)[None, :]
        total += state * load_block(gradients, channels, values, DK, DV).to(tl.float32)
    return tl.sum(total, 1)[None, :]


@triton.jit
def store_decay_gradient(dlog_decay, token, t, valid, channels, net, onward, operand: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr):
    """net: by token, what is taken less what is written. onward: what is added to its sum from each token on."""
    later = added_up(t[:, None] <= t[None, :], net, tl.bfloat16 if operand == tl.bfloat16 else tl.float32)
    store_rows(dlog_decay, token, later + onward, t, valid, channels, HV * DK, DK, net.shape[1])


@triton.jit
def anew(x, NUMBER: tl.constexpr):
    """x, which the compiler does not know: what is made of it is made once more rather than held. NUMBER: another for each use."""
    return x + NUMBER * 1e-38


@triton.jit
def taker(t, BEFORE: tl.constexpr):
    """The token that takes in row t. BEFORE its decay: the next, which sees what row t has decayed to; the first comes last."""
    if BEFORE:
        return (t + 1) % t.shape[0]
    else:
        return t


@triton.jit
def taken_from(G, middle, t, BEFORE: tl.constexpr):
    """The log2 decays, from the middle, that a row's taker sees."""
    if BEFORE:
        return tl.where((t == t.shape[0] - 1)[:, None], -middle, G)
    else:
        return G


@triton.jit
def felt(x, t, BEFORE: tl.constexpr):
    """What is taken, [C, BLOCK], less what no decay of the chunk has touched: the first token's, BEFORE its decay."""
    if BEFORE:
        return tl.where((t == t.shape[0] - 1)[:, None], 0.0, x)
    else:
        return x


@kernel("N T tokens scale weight_stride")
def gradients_kernel(
    q, k, p, log_decay, weight, states, gradients, error, v, do, derror, reads, looks, added_reads, added_looks, value_left, far,
    dq, dk, dp, dlog_decay, dweight, cu_seqlens, N, T, tokens, scale, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, ADDED: tl.constexpr, WEIGHTED: tl.constexpr, BY_CHANNEL: tl.constexpr, LEARNED: tl.constexpr,
    LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One near chunk, value head and tile of key channels a program. dq, dk, dp: [tokens, Hv, dk]; dlog_decay too, with LEARNED.

    dk is that of x and, times the weight, that of w. dweight: [tokens, Hv, dk] BY_CHANNEL, else [tiles, tokens, Hv], a tile's part.
    value_left: what a chunk leaves of a value channel where the values decay as well, [chunks, Hv, dv], or None; do and error have
    felt it. far: of `prepare_kernel`.
    """
    TILES: tl.constexpr = (DK + BK - 1) // BK
    tile = tl.program_id(0) % TILES
    n, chunk = locate(cu_seqlens, tl.program_id(0) // TILES, N, T, C, PACKED)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    slot = (tl.program_id(0) // TILES).to(tl.int64) * HV + head
    if (chunk * C >= length) | (tl.load(far + slot) > 0):
        return
    STRIDE: tl.constexpr = HV * C
    t = tl.arange(0, C)
    count = length - chunk * C
    valid = t < count
    token = first + chunk * C
    own = head // (HV // H) * DK
    place = (token * HV + head) * C
    j = t[None, :]
    channels = tile * BK + tl.arange(0, BK)
    states += slot * DK * DV
    gradients += slot * DK * DV
    if value_left is not None:
        value_left += slot * DV

    x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE)
    key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
    b = load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
    if ADDED:
        adder = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK)
    middle, rest = halves(x, t)
    G = from_middle(x, middle, t, WIDE)
    operand: tl.constexpr = key.dtype
    writer = (key.to(tl.float32) * b * power(-G)).to(operand)
    if ADDED:
        adder = (adder.to(tl.float32) * power(-G)).to(operand)

    net = tl.zeros([C, BK], tl.float32)
    reading = taker(t, READ_BEFORE)
    y = reading[:, None]
    # loads wait for memory together: all that a step takes of it comes first, and pairs stay for the columns
    read_pairs = load_pairs(reads + place, y, j, count, STRIDE)
    if ADDED:
        added_read_pairs = load_pairs(added_reads + place, y, j, count, STRIDE)
    reader = load_rows(q + own, token, reading, reading < count, channels, H * DK, DK, BK)
    x = through_state(do + head * DV, states, token, reading, reading < count, channels, HV, DK, DV, BK, BV, PRECISION)
    x *= power(middle) * scale
    x = tl.dot(read_pairs, writer, acc=x, input_precision=PRECISION)
    if ADDED:
        x = tl.dot(added_read_pairs, adder, acc=x, input_precision=PRECISION)
    up = power(taken_from(anew(G, 1), middle, t, READ_BEFORE))
    reader = (reader.to(tl.float32) * up).to(operand)
    if N > 0:  # always, but it has the compiler multiply here, and not where the product is used, with both factors held until then
        net += felt(reader.to(tl.float32) * x, t, READ_BEFORE)
    store_rows(dq + head * DK, token, x * up, reading, reading < count, channels, HV * DK, DK, BK)

    if ERASE:
        looking = taker(t, LOOK_BEFORE)
        y = looking[:, None]
        look_pairs = load_pairs(looks + place, y, j, count, STRIDE)
        if ADDED:
            added_look_pairs = load_pairs(added_looks + place, y, j, count, STRIDE)
        looker = load_rows(k + own, token, looking, looking < count, channels, H * DK, DK, BK)
        x = through_state(derror + head * DV, states, token, looking, looking < count, channels, HV, DK, DV, BK, BV, PRECISION)
        x *= -power(anew(middle, 1))
        x = tl.dot(look_pairs, writer, acc=x, input_precision=PRECISION)
        if ADDED:
            x = tl.dot(added_look_pairs, adder, acc=x, input_precision=PRECISION)
        up = power(taken_from(anew(G, 2), middle, t, LOOK_BEFORE))
        looker = (looker.to(tl.float32) * up).to(operand)
        if N > 0:
            net += felt(looker.to(tl.float32) * x, t, LOOK_BEFORE)
        store_rows(dk + head * DK, token, x * up, looking, looking < count, channels, HV * DK, DK, BK)
        tl.debug_barrier()  # read below, in other rows

    x = through_state(error + head * DV, gradients, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION) * power(rest)
    key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
    b = load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
    writer = (key.to(tl.float32) * b * power(-anew(G, 3))).to(operand)
    onward = tl.sum(writer.to(tl.float32) * x, 0)[None, :]
    x = tl.dot(tl.trans(read_pairs), reader, acc=x, input_precision=PRECISION)
    if ERASE:
        x = tl.dot(tl.trans(look_pairs), looker, acc=x, input_precision=PRECISION)
    if N > 0:  # what comes of key and weight is loaded anew in here
        net -= writer.to(tl.float32) * x
        x *= power(-anew(G, 5))
        key = load_rows(k + own, token, t, valid, channels, H * DK, DK, BK)
        if BY_CHANNEL:
            store_rows(dweight + head * DK, token, key.to(tl.float32) * x, t, valid, channels, HV * DK, DK, BK)
        elif WEIGHTED:
            at = dweight + tile * tokens.to(tl.int64) * HV + (token + t) * HV + head
            tl.store(at, tl.sum(key.to(tl.float32) * x, 1), mask=valid)
        x *= load_weights(weight, head, token, t, valid, channels, weight_stride, HV, DK, BK, WEIGHTED, BY_CHANNEL)
        if ERASE:
            x += load_rows(dk + head * DK, token, t, valid, channels, HV * DK, DK, BK).to(tl.float32)
        store_rows(dk + head * DK, token, x, t, valid, channels, HV * DK, DK, BK)

    if ADDED:
        x = through_state(v + head * DV, gradients, token, t, valid, channels, HV, DK, DV, BK, BV, PRECISION) * power(anew(rest, 1))
        adder = load_rows(p + own, token, t, valid, channels, H * DK, DK, BK)
        adder = (adder.to(tl.float32) * power(-anew(G, 4))).to(operand)
        onward += tl.sum(adder.to(tl.float32) * x, 0)[None, :]
        x = tl.dot(tl.trans(added_read_pairs), reader, acc=x, input_precision=PRECISION)
        x = tl.dot(tl.trans(added_look_pairs), looker, acc=x, input_precision=PRECISION)
        if N > 0:
            net -= adder.to(tl.float32) * x
        store_rows(dp + head * DK, token, x * power(-anew(G, 6)), t, valid, channels, HV * DK, DK, BK)
    if LEARNED:
        onward += passing(states, gradients, value_left, channels, DK, DV, BK) * power(middle + rest)
        store_decay_gradient(dlog_decay + head * DK, token, t, valid, channels, net, onward, operand, HV, DK)
