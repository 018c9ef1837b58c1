"""The states before every chunk, made once more for backward from the errors that forward has kept: nothing is solved."""

import triton.language as tl

from ..launch import kernel
from ..tiles import first_slot, load_state, scanned, states_of, tokens_of


@kernel("count T segments segment_chunks")
def states_kernel(
    writes, added, left, error, v, start, states, cu_seqlens, count, T, segments, segment_chunks,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ADDED: tl.constexpr,
    STARTED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head over one segment: S, then S <- left S + writes^T E [+ added^T V].

    states: [chunks, Hv, dk, dv], count of them in all.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    tile, _segment, n, head, first, length, _chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED
    )
    errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    writes_ = tokens_of(writes, first, head, length, HV, DK, C, BK)
    if ADDED:
        values_ = tokens_of(v, first, head, length, HV, DV, C, BV)
        added_ = tokens_of(added, first, head, length, HV, DK, C, BK)
    out = states_of(states, count, DK, DV, BK, BV)
    keys = tl.arange(0, BK)
    state = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        state = load_state(start + place * DK * DV, keys, tile * BV + tl.arange(0, BV), DK, DV)
    slot = first_slot(cu_seqlens, n, T, C, PACKED)
    for chunk in range(begin, end):
        row = chunk * C
        e = tl.trans(errors.load([row, tile * BV]))
        whole = tl.load(left + ((slot + chunk).to(tl.int64) * HV + head) * DK + keys, mask=keys < DK, other=0.0)
        out.store([(slot + chunk) * HV + head, 0, tile * BV], tl.reshape(tl.trans(state.to(e.dtype)), [1, BK, BV]))
        state = tl.dot(e, writes_.load([row, 0]), acc=state * whole[None, :], input_precision=PRECISION)
        if ADDED:
            value = tl.trans(values_.load([row, tile * BV]))
            state = tl.dot(value, added_.load([row, 0]), acc=state, input_precision=PRECISION)
