"""What backward needs of every pair of events in a chunk (ERASE): <dO_i, U_j> for reads, -<dV_i, U_j> for looks, and their decays."""

import triton.language as tl

from ..launch import kernel
from ..tiles import load_decays, load_numbers, load_rows, locate, pair_decay, product, sequence, store_pairs
from .reading import read_decays, readers_of


@kernel("N T scale weight_stride")
def pairs_kernel(
    error, do, dv, decays, weight, reads, looks, dweight, cu_seqlens, N, T, scale, weight_stride,
    HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr,
    LEAST_WEIGHT: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, LOOK_BEFORE: tl.constexpr, READ_BEFORE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program. reads: [tokens, Hv, C], looks: [events, Hv, C], row i of a reader, column j of a writer.

    WEIGHTED: dweight, [events, Hv]; dv has the weight, as `reverse` bounds it, in it.
    """
    n, chunk = locate(cu_seqlens, tl.program_id(0), N, T, C, PACKED, STEPS)
    head = tl.program_id(1)
    first, length = sequence(cu_seqlens, n, T, PACKED, STEPS)
    if chunk * C >= length:
        return
    t = tl.arange(0, C)
    channels = tl.arange(0, BV)
    valid = chunk * C + t < length
    event = first + chunk * C
    row, at, reading = readers_of(chunk, length, C, R, STEPS, READ_BEFORE)
    reader = first // STEPS + row
    e = load_rows(error + head * DV, event, t, valid, channels, HV * DV, DV, BV)
    out = load_rows(do + head * DV, reader, tl.arange(0, R), reading, channels, HV * DV, DV, BV)
    value = load_rows(dv + head * DV, event, t, valid, channels, HV * DV, DV, BV)
    b = load_numbers(weight, head, event, t, valid, weight_stride, 1.0, WEIGHTED)
    G, before, _ = load_decays(decays, head, event, t, length - chunk * C, C, HV, GATED)
    i = t[:, None]
    j = t[None, :]
    read = read_decays(decays, head, event, at, reading, G, before, HV, STEPS, GATED, READ_BEFORE)
    look = before if LOOK_BEFORE else G
    pairs = product(out, tl.trans(e), PRECISION) * (b * scale)[None, :]
    pairs *= pair_decay(read[:, None], G[None, :], at[:, None], j, READ_BEFORE)
    store_pairs(reads, reader, head, pairs, tl.arange(0, R), reading, HV, C)
    pairs = product(value, tl.trans(e), PRECISION)
    if WEIGHTED:
        own = tl.sum(tl.where(i == j, pairs, 0.0), 1) / tl.where(tl.abs(b) < LEAST_WEIGHT, LEAST_WEIGHT, b)
        tl.store(dweight + (event + t) * HV + head, own, mask=valid)
    pairs *= -b[None, :] * pair_decay(look[:, None], G[None, :], i, j, True)
    store_pairs(looks, event, head, pairs, t, valid, HV, C)
