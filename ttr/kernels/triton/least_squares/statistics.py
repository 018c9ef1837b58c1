"""The scan over chunks: the Gram matrix H before each of them, and behind the last."""

import triton.language as tl

from ..launch import kernel
from ..tiles import factor, first_slot, load_block, load_decays, load_numbers, remembered, scanned, states_of, tokens_of
from .scaled import power_below, power_of_rows, scaled_rows

ROOM = tl.constexpr(16384.0)  # what a trace is scaled to; fp16 ends at four times as much


@kernel("blocks T segments segment_chunks weight_stride")
def statistics_kernel(
    k, decays, bounds, weight, start, states, sizes, last, transfer, cu_seqlens, blocks, T, segments, segment_chunks, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, WEIGHTED: tl.constexpr, STARTED: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of columns of one head over one segment: H <- decay H + K^T (w decay K).

    start, last: [N, segments, Hv, dk, dk], float32. states: [chunks, Hv, dk, dk], H / size; sizes: [chunks, Hv]. No entry
    is larger than the trace, which a size brings to ROOM: in fp16 it keeps eleven bits.
    LOCAL: from H = 0, nothing but `last` and the segment's log2 decay, transfer [N, segments, Hv].
    """
    TILES: tl.constexpr = (DK + TILE - 1) // TILE
    tile, segment, n, head, first, length, chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED
    )
    slot = first_slot(cu_seqlens, n, T, C, PACKED)
    rows = tokens_of(k, first, head // (HV // H), length, H, DK, C, BK)
    columns = tokens_of(k, first, head // (HV // H), length, H, DK, C, TILE)
    keys = tl.arange(0, BK)
    values = tile * TILE + tl.arange(0, TILE)
    i = tl.arange(0, C)
    state = tl.zeros([BK, TILE], tl.float32)
    trace = 0.0
    left = 0.0
    felt = end - begin
    if LOCAL:
        if GATED:
            felt, left = remembered(bounds, head, slot + begin, end - begin, HV, False)
    else:
        kept = states_of(states, blocks * HV, DK, DK, BK, TILE)
    if STARTED:
        state = load_block(start + place * DK * DK, keys, values, DK, DK)
        diagonal = tl.load(start + place * DK * DK + keys * (DK + 1), mask=keys < DK, other=0.0)
        trace = tl.sum(tl.abs(diagonal), 0)

    for chunk in range(end - felt, end):
        token = first + chunk * C
        valid = chunk * C + i < length
        key = rows.load([chunk * C, 0])
        G, _, whole = load_decays(decays, head, token, i, length - chunk * C, C, HV, GATED)
        b = load_numbers(weight, head, token, i, valid, weight_stride, 1.0, WEIGHTED)
        if not LOCAL:
            power = power_below(trace) * ROOM
            at = (slot + chunk) * HV + head
            kept.store([at, 0, tile * TILE], tl.reshape((state * power).to(OPERAND), [1, BK, TILE]))
            if tile == 0:
                tl.store(sizes + at, 1.0 / power)
        unit = power_of_rows(key)
        written = tl.where(valid, b * factor(whole - G) / (unit * unit), 0.0)
        most = tl.sum(tl.abs(written), 0)
        power = power_below(most)
        write = scaled_rows(columns.load([chunk * C, tile * TILE]), unit * written * power, OPERAND)
        added = tl.dot(tl.trans(scaled_rows(key, unit, OPERAND)), write, input_precision=PRECISION)
        state = state * factor(whole) + added * (1.0 / power)
        trace = trace * factor(whole) + most

    if LOCAL | ((end == chunks) & ((begin < chunks) | (segment == 0))):
        if LOCAL:
            base = last + place * DK * DK
        else:
            base = last + (n * HV + head).to(tl.int64) * DK * DK
        tl.store(base + keys[:, None] * DK + values[None, :], state, mask=(keys < DK)[:, None] & (values < DK)[None, :])
    if LOCAL and tile == 0:
        tl.store(transfer + place, left)
