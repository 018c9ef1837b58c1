"""All that the scan and the solve take of a chunk's keys and decays; every chunk on its own."""

import triton
import triton.language as tl

from ..launch import kernel
from ..least_squares.scaled import power_of_rows
from ..tiles import load_numbers, load_rows, locate, sequence, store_rows
from ..vector_gate.decays import halves, load_decays, power, summed


@triton.jit
def rounds_of(x, REACH: tl.constexpr, ROUNDS: tl.constexpr):
    """Rounds of a far chunk (`solve_far`) whose log2 decays are x: the first has the largest blocks with no half that strays too far."""
    C: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    rounds = ROUNDS
    for level in tl.static_range(1, ROUNDS - 1):
        strayed = tl.min(tl.sum(tl.reshape(x, [C >> (level - 1), 1 << (level - 1), BLOCK]), 1))
        rounds -= tl.where(strayed >= -REACH, 1, 0)  # what holds of a block holds of smaller ones
    return rounds


@kernel("N T weight_stride")
def operands_kernel(
    k, log_decay, weight, writes, added, gains, left, middles, keys, written, lookers, sums, far, cu_seqlens, N, T, weight_stride,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr,
    READ_BEFORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, PER_TOKEN: tl.constexpr, REACH: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program; h the log2 of e summed over the chunk, `middle` the middle's and half of REACH, a whole number:
    of what exceeds 1 the keys have more, whose size is known; lookers multiply directions, which may have grown.

        added, writes     w k k^T at the chunk's end, k 2^(whole - h): rows of norm 1/2 to 1, what they lack is in `added`
        gains, left       the diagonal of what is written, or a bound of it; 2^whole
        written, keys     w k k^T, k as it is, likewise; near: k 2^(middle - h)
        lookers, middles  near: 2^(h - middle), h before the token where it reads before; 2^middle (far: 1)
        sums              far: h

    writes, keys, lookers, sums: [tokens, Hv, dk]; added, written: [tokens, Hv]; gains, left, middles: [chunks, Hv, dk].
    far: [chunks, Hv], the rounds of a chunk in a half of which a channel strays further than 2^REACH, else 0.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    place = slot.to(tl.int64) * HV + head
    t = tl.arange(0, C)
    valid = chunk * C + t < length
    token = first + chunk * C
    numbers = (token + t) * HV + head
    channels = tl.arange(0, BK)
    of_chunk = place * DK + channels[None, :]
    there = (channels < DK)[None, :]

    x = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, WIDE) * 0.5
    h, looked, whole = summed(x, t, READ_BEFORE, WIDE)
    early, late = halves(x, t)
    b = tl.where(valid, load_numbers(weight, head, token, t, valid, weight_stride, 1.0, WEIGHTED), 0.0)
    key = load_rows(k + head // (HV // H) * DK, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
    row = key * power(whole - h)
    unit = power_of_rows(row)
    row *= unit[:, None]
    b_row = b / (unit * unit)
    store_rows(writes + head * DK, token, row, t, valid, channels, HV * DK, DK, BK)
    tl.store(added + numbers, b_row, mask=valid)
    tl.store(gains + of_chunk, tl.sum(row * row * tl.abs(b_row)[:, None], 0)[None, :], mask=there)
    tl.store(left + of_chunk, power(whole), mask=there)

    key = load_rows(k + head // (HV // H) * DK, token, t, valid, channels, H * DK, DK, BK).to(tl.float32)
    unit = power_of_rows(key)
    key *= unit[:, None]
    tl.store(written + numbers, b / (unit * unit), mask=valid)
    if tl.min(tl.minimum(early, late)) >= -REACH:
        middle = tl.floor(early.to(tl.float32) + (REACH / 2 + 0.5))
        store_rows(keys + head * DK, token, key * power(middle - h), t, valid, channels, HV * DK, DK, BK)
        store_rows(lookers + head * DK, token, power(looked - middle), t, valid, channels, HV * DK, DK, BK)
        tl.store(middles + of_chunk, tl.exp2(middle), mask=there)
        tl.store(far + place, 0)
    else:
        store_rows(keys + head * DK, token, key, t, valid, channels, HV * DK, DK, BK)
        store_rows(sums + head * DK, token, h, t, valid, channels, HV * DK, DK, BK)
        tl.store(middles + of_chunk, tl.full([1, BK], 1.0, tl.float32), mask=there)
        again = load_decays(log_decay + head * DK, token, t, valid, channels, HV * DK * PER_TOKEN, DK, BK, False)  # registers are short
        tl.store(far + place, rounds_of(again * 0.5, REACH, ROUNDS))
