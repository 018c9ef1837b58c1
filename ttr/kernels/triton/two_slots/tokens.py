"""The gradients of q and k, and of what a chunk leaves of its first states and writes to its last."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_block, load_rows, locate, product, sequence, store_rows
from .levels import levels_of, load_column, load_look, load_read


@kernel("N T")
def tokens_kernel(
    q, k, error, do, dv, read_pairs, look_pairs, levels, starts, ends, dq, dk, dlevels, dmixing, cu_seqlens, N, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, ERASE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program, key channels BK at a time; Z before the chunk (starts), D behind it (ends):

    dQ = sum_s Q_s * (dO Z_s^T) + read_pairs K,           dQ_s = <Q, dO Z_s^T>,    dX_s = -<K, dV Z_s^T>
    dK = sum_s F_s * (U D_s^T) - sum_s X_s * (dV Z_s^T)   dF_s = <K, U D_s^T>,     dphi_sl = <D_s, Z_l>
         + (look_pairs + look_pairs^T) K + read_pairs^T Q
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    values = tl.arange(0, BV)
    here = levels_of(levels, slot, head, HV, C, LEVELS)
    given = levels_of(dlevels, slot, head, HV, C, LEVELS) + 6 * LEVELS * C
    place = (slot.to(tl.int64) * HV + head) * 2 * DK * DV
    e = load_rows(error + head * DV, token, t, valid, values, HV * DV, DV, BV)
    out = load_rows(do + head * DV, token, t, valid, values, HV * DV, DV, BV)
    r0, r1 = load_read(here, LEVELS, t, C)
    f0, f1 = load_column(here, LEVELS, t, C)
    read = load_rows(read_pairs + head * C, token, t, valid, t, HV * C, C, C)
    if ERASE:
        value = load_rows(dv + head * DV, token, t, valid, values, HV * DV, DV, BV)
        look = load_rows(look_pairs + head * C, token, t, valid, t, HV * C, C, C)
        look += tl.trans(look)  # exact: of every two numbers that meet here one is 0
        l0, l1 = load_look(here, LEVELS, t, C)
    dr0 = tl.zeros([C], tl.float32)
    dr1 = dr0
    dl0 = dr0
    dl1 = dr0
    df0 = dr0
    df1 = dr0
    p00 = tl.zeros([BK], tl.float32)
    p01 = p00
    p10 = p00
    p11 = p00
    for channel in tl.range(0, DK, BK, disable_licm=True):
        keys = channel + tl.arange(0, BK)
        query = load_rows(q + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        key = load_rows(k + head // (HV // H) * DK, token, t, valid, keys, H * DK, DK, BK)
        z0 = load_block(starts + place, keys, values, DK, DV)
        z1 = load_block(starts + place + DK * DV, keys, values, DK, DV)
        x = product(out, tl.trans(z0), PRECISION)
        dr0 += tl.sum(x * query.to(tl.float32), 1)
        grad = x * r0[:, None]
        x = product(out, tl.trans(z1), PRECISION)
        dr1 += tl.sum(x * query.to(tl.float32), 1)
        grad += x * r1[:, None]
        grad = tl.dot(read, key, acc=grad, input_precision=PRECISION)
        store_rows(dq + head * DK, token, grad, t, valid, keys, HV * DK, DK, BK)
        d0 = load_block(ends + place, keys, values, DK, DV)
        d1 = load_block(ends + place + DK * DV, keys, values, DK, DV)
        x = product(e, tl.trans(d0), PRECISION)
        df0 += tl.sum(x * key.to(tl.float32), 1)
        grad = x * f0[:, None]
        x = product(e, tl.trans(d1), PRECISION)
        df1 += tl.sum(x * key.to(tl.float32), 1)
        grad += x * f1[:, None]
        if ERASE:
            x = product(value, tl.trans(z0), PRECISION)
            dl0 -= tl.sum(x * key.to(tl.float32), 1)
            grad -= x * l0[:, None]
            x = product(value, tl.trans(z1), PRECISION)
            dl1 -= tl.sum(x * key.to(tl.float32), 1)
            grad -= x * l1[:, None]
            grad = tl.dot(look, key, acc=grad, input_precision=PRECISION)
        grad = tl.dot(tl.trans(read), query, acc=grad, input_precision=PRECISION)
        store_rows(dk + head * DK, token, grad, t, valid, keys, HV * DK, DK, BK)
        p00 += tl.sum(d0.to(tl.float32) * z0.to(tl.float32), 1)
        p01 += tl.sum(d0.to(tl.float32) * z1.to(tl.float32), 1)
        p10 += tl.sum(d1.to(tl.float32) * z0.to(tl.float32), 1)
        p11 += tl.sum(d1.to(tl.float32) * z1.to(tl.float32), 1)
    if ERASE:
        tl.store(given + t, dl0)
        tl.store(given + C + t, dl1)
    tl.store(given + 2 * C + t, dr0)
    tl.store(given + 3 * C + t, dr1)
    tl.store(given + 4 * C + t, df0)
    tl.store(given + 5 * C + t, df1)
    mixed = dmixing + (slot.to(tl.int64) * HV + head) * 4
    tl.store(mixed, tl.sum(p00, 0))
    tl.store(mixed + 1, tl.sum(p01, 0))
    tl.store(mixed + 2, tl.sum(p10, 0))
    tl.store(mixed + 3, tl.sum(p11, 0))
