"""The way back: piece by piece of `every` tokens, the slots before each of a piece's events made again."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import sequence
from .event import add, advance, checkpoint_of, error_of, load_numbers, load_row, one_of, row_of, row_of_tokens, store_numbers


@kernel("T rows every groups")
def backward_kernel(
    q, k, v, A, b, c, read, known, known_key, known_value, cu_seqlens, checkpoints, history, do, dlast,
    dq, dk, dv, dA, db, dc, dread, dknown, dknown_key, dknown_value, dfirst, T, rows, every, groups,
    H: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    Q1: tl.constexpr, Q2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    SOLVE: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One memory a program, and every groups-th tile of value channels in turn, with g the gradient of the slots z behind an event:

    dE = k (sum_s b_s g_s),  dk = sum_s b_s g_s E^T + c_s z_s dE^T,  g <- A^T g + c k dE^T  and, where q reads,  g += read q do^T

    history: [every STEPS, R, memories, DK, DV]. Gradients are as what they are of, those summed over values behind an axis of groups;
    None: nobody wants it.
    """
    group = tl.program_id(1).to(tl.int64)
    memory = tl.program_id(0).to(tl.int64)
    first_token, length = sequence(cu_seqlens, tl.program_id(0) // H, T, PACKED)  # type: ignore[misc]
    row = row_of_tokens(memory, first_token, T, H, PACKED)
    slot = tl.arange(0, R)[:, None, None].to(tl.int64)
    keys = tl.arange(0, BK)[None, :, None]
    memories = tl.num_programs(0).to(tl.int64)
    size = memories * (R * DK * DV)
    tokens = rows.to(tl.int64) * T
    events = tokens * STEPS
    if dq is not None:
        dq += group * (tokens * DK)
    if dk is not None:
        dk += group * (events * DK)
    if dA is not None and A2 == 1:
        dA += group * (events * (R * R * A1))
    if db is not None and B2 == 1:
        db += group * (events * (R * B1))
    if dc is not None and C2 == 1:
        dc += group * (events * (R * C1))
    if dread is not None and Q2 == 1:
        dread += group * (tokens * (R * Q1))
    if dknown_key is not None:
        dknown_key += group * (events * DK)
    if dknown is not None and K2 == 1:
        dknown += group * (events * (R * K1))
    for tile in range(tl.program_id(1), tl.cdiv(DV, BV), groups):
        again = tile >= groups
        values = (tile * BV + tl.arange(0, BV))[None, None, :]
        inside = (slot >= 0) & (keys < DK) & (values < DV)
        place = (slot * memories + memory) * (DK * DV) + keys * DV + values
        g = tl.zeros([R, BK, BV], tl.float32)
        if dlast is not None:
            g += tl.load(dlast + place, mask=inside, other=0.0)
        pieces = tl.cdiv(length, every)
        for back in range(pieces):
            piece = pieces - 1 - back
            here = piece * every
            end = tl.minimum(here + every, length)
            kept = checkpoint_of(slot, memory, first_token, piece, T, every, keys, values, DK, DV, H, PACKED)
            z = tl.load(checkpoints + kept, mask=inside, other=0.0)
            for i in range((end - here) * STEPS):
                tl.store(history + i * size + place, z, mask=inside)
                z = advance(
                    z, k, v, A, b, c, known, known_key, known_value, (row + here) * STEPS + i, events,
                    slot, keys, values, R, DK, DV, A1, A2, B1, B2, C1, C2, K1, K2, SOLVE,
                )  # fmt: skip
            tl.debug_barrier()  # what is read back may have been written by another thread
            for ago in range(end - here):
                t = end - 1 - ago
                token = row + t
                if not BEFORE:
                    g = reader(g, z, again, q, read, do, dq, dread, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
                for earlier in range(STEPS):
                    step = STEPS - 1 - earlier
                    event = token * STEPS + step
                    z = tl.load(history + ((t - here) * STEPS + step) * size + place, mask=inside, other=0.0)
                    if known is not None:  # what is written without an error
                        writer(
                            g, again, known, known_key, known_value, dknown, dknown_key, dknown_value,
                            event, events, slot, keys, values, DK, DV, K1, K2,
                        )  # fmt: skip
                    error = error_of(z, k, v, c, event, events, slot, keys, values, DK, DV, C1, C2, SOLVE)
                    key = load_row(k, event, keys, DK)
                    if db is not None:
                        store_numbers(db, g * (key * error), again, slot, event, events, keys, values, B1, B2)
                    written = tl.sum(load_numbers(b, slot, event, events, keys, values, B1, B2) * g, 0, keep_dims=True)
                    derror = tl.sum(written * key, 1, keep_dims=True)
                    if dv is not None:
                        tl.store(dv + event * DV + values, -derror, mask=values < DV)
                    grad = written * error
                    before = tl.zeros([R, BK, BV], tl.float32)
                    if SOLVE:
                        look = load_numbers(c, slot, event, events, keys, values, C1, C2)
                        before += look * (key * derror)
                        grad += tl.sum(look * z, 0, keep_dims=True) * derror
                        if dc is not None:
                            store_numbers(dc, z * (key * derror), again, slot, event, events, keys, values, C1, C2)
                    if dk is not None:
                        add(dk + event * DK + keys, tl.sum(grad, 2, keep_dims=True), keys < DK, again)
                    for j in tl.static_range(R):
                        if dA is not None:
                            store_numbers(dA, g * one_of(z, slot, j), again, slot * R + j, event, events, keys, values, A1, A2)
                        left = load_numbers(A, slot * R + j, event, events, keys, values, A1, A2) * g
                        before += tl.where(slot == j, tl.sum(left, 0, keep_dims=True), 0.0)
                    g = before
                if BEFORE:
                    g = reader(g, z, again, q, read, do, dq, dread, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
            tl.debug_barrier()  # the next piece writes where this one read
        if dfirst is not None:
            tl.store(dfirst + place, g, mask=inside)


@triton.jit
def reader(
    g, z, again, q, read, do, dq, dread, token, tokens, slot, keys, values,
    DK: tl.constexpr, DV: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """A query reads z: g with what that adds, dq and dread stored."""
    query, out = load_row(q, token, keys, DK), load_row(do, token, values, DV)
    coefficient = load_numbers(read, slot, token, tokens, keys, values, Q1, Q2)
    if dq is not None:
        add(dq + token * DK + keys, row_of(coefficient * z * out, 2), keys < DK, again)
    if dread is not None:
        store_numbers(dread, z * (query * out), again, slot, token, tokens, keys, values, Q1, Q2)
    return g + coefficient * (query * out)


@triton.jit
def writer(
    g, again, known, known_key, known_value, dknown, dknown_key, dknown_value, event, events, slot, keys, values,
    DK: tl.constexpr, DV: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """The gradients of known, known_key and known_value, stored."""
    key, value = load_row(known_key, event, keys, DK), load_row(known_value, event, values, DV)
    if dknown is not None:
        store_numbers(dknown, g * (key * value), again, slot, event, events, keys, values, K1, K2)
    written = tl.sum(load_numbers(known, slot, event, events, keys, values, K1, K2) * g, 0, keep_dims=True)
    if dknown_key is not None:
        add(dknown_key + event * DK + keys, tl.sum(written * value, 2, keep_dims=True), keys < DK, again)
    if dknown_value is not None:
        tl.store(dknown_value + event * DV + values, tl.sum(written * key, 1, keep_dims=True), mask=values < DV)
