"""The scan over chunks: outputs, the state after the last token, and the errors that backward wants to find again.

Transposed throughout, as in the scalar gate's (values are rows): the state S [dv, dk] and the errors E [dv, C] are accumulators
of one product and the register operand of the next. Of the decays nothing is left to do but `left`, a factor a key channel.
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import first_slot, load_state, product, scanned, store_state, tokens_of


@kernel("T segments segment_chunks")
def forward_kernel(
    queries, looks, writes, added, errors_of, reads, added_reads, left, v, start, o, error, last, transfer, cu_seqlens,
    T, segments, segment_chunks,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr,
    ADDED: tl.constexpr, STARTED: tl.constexpr, LOCAL: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head over one segment (segment_chunks chunks) of a sequence.

        E = errors_of V + looks S           without ERASE E = V
        O = queries S + reads E [+ added_reads V],      S <- left S + writes^T E [+ added^T V]

    errors_of: `inverse`, with ADDED `added_errors`. start, last: [N, segments, Hv, dk, dv]. SAVE: E too.
    LOCAL: from S = 0, no outputs but `last` and the segment's transfer: [N, segments, Hv, dk, dk], carried by further tiles
    that begin with the identity (ERASE), or the product of `left`, [N, segments, Hv, dk].
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV + ((DK + BV - 1) // BV if LOCAL and ERASE else 0)
    tile, segment, n, head, first, length, chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 0, HV, C, PACKED
    )
    values_ = tokens_of(v, first, head, length, HV, DV, C, BV)
    writes_ = tokens_of(writes, first, head, length, HV, DK, C, BK)
    if not LOCAL:
        queries_ = tokens_of(queries, first, head, length, HV, DK, C, BK)
        reads_ = tokens_of(reads, first, head, length, HV, C, C, C)
        outs = tokens_of(o, first, head, length, HV, DV, C, BV)
    if ERASE:
        looks_ = tokens_of(looks, first, head, length, HV, DK, C, BK)
        systems = tokens_of(errors_of, first, head, length, HV, C, C, C)
        if SAVE:
            errors = tokens_of(error, first, head, length, HV, DV, C, BV)
    if ADDED:
        added_ = tokens_of(added, first, head, length, HV, DK, C, BK)
        if not LOCAL:
            added_reads_ = tokens_of(added_reads, first, head, length, HV, C, C, C)
    keys = tl.arange(0, BK)
    values = tile * BV + tl.arange(0, BV)
    state = tl.zeros([BV, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32) + 1.0
    if LOCAL and ERASE:
        unit = tile - tl.cdiv(DV, BV)
        if unit >= 0:
            values = unit * BV + tl.arange(0, BV)
            state = tl.where(values[:, None] == keys[None, :], 1.0, 0.0)
    if STARTED:
        state = load_state(start + place * DK * DV, keys, values, DK, DV)
    slot = first_slot(cu_seqlens, n, T, C, PACKED)

    for chunk in range(begin, end):
        row = chunk * C
        value = tl.trans(values_.load([row, tile * BV]))
        operand = value.dtype
        whole = tl.load(left + ((slot + chunk).to(tl.int64) * HV + head) * DK + keys, mask=keys < DK, other=0.0)
        past = state.to(operand)
        e = value
        if ERASE:
            e = product(value, tl.trans(systems.load([row, 0])), PRECISION)
            e = tl.dot(past, tl.trans(looks_.load([row, 0])), acc=e, input_precision=PRECISION).to(operand)
            if SAVE:
                errors.store([row, tile * BV], tl.trans(e))
        state = tl.dot(e, writes_.load([row, 0]), acc=state * whole[None, :], input_precision=PRECISION)
        if ADDED:
            state = tl.dot(value, added_.load([row, 0]), acc=state, input_precision=PRECISION)
        if LOCAL:
            kept *= whole
        else:
            out = product(past, tl.trans(queries_.load([row, 0])), PRECISION)
            out = tl.dot(e, tl.trans(reads_.load([row, 0])), acc=out, input_precision=PRECISION)
            if ADDED:
                out = tl.dot(value, tl.trans(added_reads_.load([row, 0])), acc=out, input_precision=PRECISION)
            outs.store([row, tile * BV], tl.trans(out.to(operand)))

    if LOCAL:
        if ERASE and tile >= tl.cdiv(DV, BV):
            store_state(transfer + place * DK * DK, state, keys, values, DK, DK)
        else:
            store_state(last + place * DK * DV, state, keys, values, DK, DV)
        if not ERASE and tile == 0:
            tl.store(transfer + place * DK + keys, kept, mask=keys < DK)
    elif (end == chunks) & ((begin < chunks) | (segment == 0)):
        store_state(last + (n * HV + head).to(tl.int64) * DK * DV, state, keys, values, DK, DV)
