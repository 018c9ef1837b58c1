"""The scan from the last chunk to the first: the gradient D of the Gram matrix behind each of them, and of the first."""

import triton.language as tl

from ..launch import kernel
from ..tiles import first_slot, load_block, scanned, states_of, tokens_of


@kernel("count T segments segment_chunks")
def gram_reverse_kernel(
    seen, solved, left, end_gradient, gradients, first_gradient, transfer, cu_seqlens, count, T, segments, segment_chunks,
    HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, STARTED: tl.constexpr, FIRST: tl.constexpr,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of columns of one head over one segment, backwards: D <- left D left - (X^T dQ + dQ^T X) / 2.

    seen, solved: -x 2^h and -dq 2^h, [tokens, Hv, dk]. gradients: [chunks, Hv, dk, dk], D behind every chunk, count of them in all.
    end_gradient, symmetric, first_gradient: [N, segments, Hv, dk, dk], float32. FIRST: first_gradient of segment 0.
    LOCAL: from D = 0, nothing but first_gradient of segments 1, 2, ... and their decays, transfer [N, segments, Hv, dk].
    """
    TILES: tl.constexpr = (DK + TILE - 1) // TILE
    tile, segment, n, head, first, length, _chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 1 if LOCAL else 0, HV, C, PACKED
    )  # LOCAL: the first segment is nobody's future
    slot = first_slot(cu_seqlens, n, T, C, PACKED)
    x_rows = tokens_of(seen, first, head, length, HV, DK, C, BK)
    y_rows = tokens_of(solved, first, head, length, HV, DK, C, BK)
    x_columns = tokens_of(seen, first, head, length, HV, DK, C, TILE)
    y_columns = tokens_of(solved, first, head, length, HV, DK, C, TILE)
    keys = tl.arange(0, BK)
    values = tile * TILE + tl.arange(0, TILE)
    gradient = tl.zeros([BK, TILE], tl.float32)
    kept = tl.zeros([BK], tl.float32) + 1.0
    if not LOCAL:
        states = states_of(gradients, count, DK, DK, BK, TILE)
    if STARTED:
        gradient = load_block(end_gradient + place * DK * DK, keys, values, DK, DK)

    for step in range(0, end - begin):
        chunk = end - 1 - step
        row = chunk * C
        at = (slot + chunk) * HV + head
        here = at.to(tl.int64) * DK
        whole = tl.load(left + here + keys, mask=keys < DK, other=0.0)
        whole_of_tile = tl.load(left + here + values, mask=values < DK, other=0.0)
        if LOCAL:
            kept *= whole
        else:
            states.store([at, 0, tile * TILE], tl.reshape(gradient.to(gradients.dtype.element_ty), [1, BK, TILE]))
        both = tl.dot(tl.trans(x_rows.load([row, 0])), y_columns.load([row, tile * TILE]), input_precision=PRECISION)
        both = tl.dot(tl.trans(y_rows.load([row, 0])), x_columns.load([row, tile * TILE]), acc=both, input_precision=PRECISION)
        gradient = gradient * (whole[:, None] * whole_of_tile[None, :]) - 0.5 * both

    if LOCAL or FIRST:
        if LOCAL:
            base = first_gradient + place * DK * DK
        else:
            base = first_gradient + (n * HV + head).to(tl.int64) * DK * DK
        inside = (keys < DK)[:, None] & (values < DK)[None, :]
        if LOCAL | (segment == 0):
            tl.store(base + keys[:, None] * DK + values[None, :], gradient, mask=inside)
    if LOCAL and tile == 0:
        tl.store(transfer + place * DK + keys, kept, mask=keys < DK)
