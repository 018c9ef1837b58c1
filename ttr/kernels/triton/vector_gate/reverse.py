"""The scan from the last chunk to the first: the gradients of the states and of the errors, transposed as `forward`.

D is the gradient of the state after a chunk, Y that of the errors as the state and the outputs take them:

    Y = writes D + reads^T dO,    dE = inverse^T Y,    D <- left D + queries^T dO + looks^T Y

Without ERASE, dE = Y. Of errors that are values less what was predicted, it is the gradient of v.
"""

import triton.language as tl

from ..launch import kernel
from ..tiles import first_slot, load_state, product, scanned, states_of, store_state, tokens_of


@kernel("count T segments segment_chunks")
def reverse_kernel(
    queries, looks, writes, inverse, reads, left, do, end_gradient, derror, gradients, first_gradient, cu_seqlens,
    count, T, segments, segment_chunks,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr,
    FIRST: tl.constexpr, STARTED: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of value channels of one head over one segment, backwards.

    derror: dE. gradients: [chunks, Hv, dk, dv], D behind every chunk, count of them in all.
    end_gradient, first_gradient: [N, segments, Hv, dk, dv]. FIRST: first_gradient of segment 0.
    LOCAL: from D = 0, nothing but first_gradient, of segments 1, 2, ...
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    tile, segment, n, head, first, length, _chunks, begin, end, place = scanned(
        cu_seqlens, T, segments, segment_chunks, TILES, 1 if LOCAL else 0, HV, C, PACKED
    )  # LOCAL: the first segment is nobody's future
    outs = tokens_of(do, first, head, length, HV, DV, C, BV)
    queries_ = tokens_of(queries, first, head, length, HV, DK, C, BK)
    if ERASE or not LOCAL:
        writes_ = tokens_of(writes, first, head, length, HV, DK, C, BK)
        reads_ = tokens_of(reads, first, head, length, HV, C, C, C)
    if ERASE:
        looks_ = tokens_of(looks, first, head, length, HV, DK, C, BK)
    if not LOCAL:
        states = states_of(gradients, count, DK, DV, BK, BV)
        derrors = tokens_of(derror, first, head, length, HV, DV, C, BV)
        if ERASE:
            systems = tokens_of(inverse, first, head, length, HV, C, C, C)
    keys = tl.arange(0, BK)
    values = tile * BV + tl.arange(0, BV)
    gradient = tl.zeros([BV, BK], tl.float32)
    if STARTED:
        gradient = load_state(end_gradient + place * DK * DV, keys, values, DK, DV)
    slot = first_slot(cu_seqlens, n, T, C, PACKED)

    for step in range(0, end - begin):
        chunk = end - 1 - step
        row = chunk * C
        out = tl.trans(outs.load([row, tile * BV]))
        operand = out.dtype
        whole = tl.load(left + ((slot + chunk).to(tl.int64) * HV + head) * DK + keys, mask=keys < DK, other=0.0)
        future = gradient.to(operand)
        if not LOCAL:
            states.store([(slot + chunk) * HV + head, 0, tile * BV], tl.reshape(tl.trans(future), [1, BK, BV]))
        gradient = tl.dot(out, queries_.load([row, 0]), acc=gradient * whole[None, :], input_precision=PRECISION)
        if ERASE or not LOCAL:
            y = product(future, tl.trans(writes_.load([row, 0])), PRECISION)
            y = tl.dot(out, reads_.load([row, 0]), acc=y, input_precision=PRECISION).to(operand)
        if ERASE:
            gradient = tl.dot(y, looks_.load([row, 0]), acc=gradient, input_precision=PRECISION)
        if not LOCAL:
            if ERASE:
                y = product(y, systems.load([row, 0]), PRECISION).to(operand)
            derrors.store([row, tile * BV], tl.trans(y))

    if LOCAL:
        store_state(first_gradient + place * DK * DV, gradient, keys, values, DK, DV)
    elif FIRST and segment == 0:
        store_state(first_gradient + (n * HV + head).to(tl.int64) * DK * DV, gradient, keys, values, DK, DV)
