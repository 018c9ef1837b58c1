"""The way back: piece by piece of `every` tokens, the slots before each of a piece's events made again."""

import triton
import triton.language as tl

from ..launch import kernel
from .event import advance, error_of, load_numbers, load_row, one_of, row_of, store_numbers


@kernel("T heads every")
def backward_kernel(
    q, x, w, v, A, b, c, read, known, known_key, known_value, checkpoints, history, do, dlast,
    dq, dx, dw, dv, dA, db, dc, dread, dknown, dknown_key, dknown_value, dfirst, T, heads, every,
    STEPS: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    Q1: tl.constexpr, Q2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, SOLVE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """One head and tile of value channels a program, with g the gradient of the slots z behind an event:

    dE = w (sum_s b_s g_s),  du = sum_s b_s g_s E^T,  g <- A^T g + c x dE^T  and, where q reads,  g += read q do^T

    history: [every STEPS, R, heads, DK, DV]. Gradients are as what they are of, behind an axis of tiles; those over values have none.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, R)[:, None, None].to(tl.int64)
    keys = tl.arange(0, BK)[None, :, None]
    values = (tile * BV + tl.arange(0, BV))[None, None, :]
    inside = (slot >= 0) & (keys < DK) & (values < DV)
    place = (slot * heads + head) * (DK * DV) + keys * DV + values
    size = heads.to(tl.int64) * (R * DK * DV)
    tokens = heads.to(tl.int64) * T
    events = tokens * STEPS
    part = tile.to(tl.int64) * tokens
    dq += part * DK
    dw += part * (STEPS * DK)
    if A2 == 1:
        dA += part * (STEPS * R * R * A1)
    if B2 == 1:
        db += part * (STEPS * R * B1)
    if SOLVE:
        dx += part * (STEPS * DK)
        if C2 == 1:
            dc += part * (STEPS * R * C1)
    if Q2 == 1:
        dread += part * (R * Q1)
    if known is not None:
        dknown_key += part * (STEPS * DK)
        if K2 == 1:
            dknown += part * (STEPS * R * K1)
    g = tl.zeros([R, BK, BV], tl.float32)
    if dlast is not None:
        g += tl.load(dlast + place, mask=inside, other=0.0)
    pieces = tl.cdiv(T, every)
    for back in range(pieces):
        piece = pieces - 1 - back
        begin = piece * every
        end = tl.minimum(begin + every, T)
        z = tl.load(checkpoints + piece * size + place, mask=inside, other=0.0)
        for i in range((end - begin) * STEPS):
            tl.store(history + i * size + place, z, mask=inside)
            z = advance(
                z, x, w, v, A, b, c, known, known_key, known_value, (head * T + begin) * STEPS + i, events,
                slot, keys, values, R, DK, DV, A1, A2, B1, B2, C1, C2, K1, K2, SOLVE,
            )  # fmt: skip
        tl.debug_barrier()  # what is read back may have been written by another thread
        for ago in range(end - begin):
            t = end - 1 - ago
            token = head * T + t
            if not BEFORE:
                g = reader(g, z, q, read, do, dq, dread, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
            for earlier in range(STEPS):
                step = STEPS - 1 - earlier
                event = token * STEPS + step
                z = tl.load(history + ((t - begin) * STEPS + step) * size + place, mask=inside, other=0.0)
                # what is written with the error
                error = error_of(z, x, v, c, event, events, slot, keys, values, DK, DV, C1, C2, SOLVE)
                write = load_row(w, event, keys, DK)
                store_numbers(db, g * (write * error), slot, event, events, keys, values, B1, B2)
                written = tl.sum(load_numbers(b, slot, event, events, keys, values, B1, B2) * g, 0, keep_dims=True)
                tl.store(dw + event * DK + keys, tl.sum(written * error, 2, keep_dims=True), mask=keys < DK)
                derror = tl.sum(written * write, 1, keep_dims=True)
                if v is not None:
                    tl.store(dv + event * DV + values, -derror, mask=values < DV)
                # what is written without one
                if known is not None:
                    key, value = load_row(known_key, event, keys, DK), load_row(known_value, event, values, DV)
                    store_numbers(dknown, g * (key * value), slot, event, events, keys, values, K1, K2)
                    written = tl.sum(load_numbers(known, slot, event, events, keys, values, K1, K2) * g, 0, keep_dims=True)
                    tl.store(dknown_key + event * DK + keys, tl.sum(written * value, 2, keep_dims=True), mask=keys < DK)
                    tl.store(dknown_value + event * DV + values, tl.sum(written * key, 1, keep_dims=True), mask=values < DV)
                # the slots before
                before = tl.zeros([R, BK, BV], tl.float32)
                for j in tl.static_range(R):
                    store_numbers(dA, g * one_of(z, slot, j), slot * R + j, event, events, keys, values, A1, A2)
                    left = load_numbers(A, slot * R + j, event, events, keys, values, A1, A2) * g
                    before = tl.where(slot == j, tl.sum(left, 0, keep_dims=True), before)
                g = before
                if SOLVE:
                    look = load_row(x, event, keys, DK)
                    coefficient = load_numbers(c, slot, event, events, keys, values, C1, C2)
                    store_numbers(dc, z * (look * derror), slot, event, events, keys, values, C1, C2)
                    tl.store(dx + event * DK + keys, row_of(coefficient * z * derror, 2), mask=keys < DK)
                    g += coefficient * (look * derror)
            if BEFORE:
                g = reader(g, z, q, read, do, dq, dread, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
        tl.debug_barrier()  # the next piece writes where this one read
    if dfirst is not None:
        tl.store(dfirst + place, g, mask=inside)


@triton.jit
def reader(
    g, z, q, read, do, dq, dread, token, tokens, slot, keys, values,
    DK: tl.constexpr, DV: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """A query reads z: g with what that adds, dq and dread stored."""
    query, out = load_row(q, token, keys, DK), load_row(do, token, values, DV)
    coefficient = load_numbers(read, slot, token, tokens, keys, values, Q1, Q2)
    tl.store(dq + token * DK + keys, row_of(coefficient * z * out, 2), mask=keys < DK)
    store_numbers(dread, z * (query * out), slot, token, tokens, keys, values, Q1, Q2)
    return g + coefficient * (query * out)
