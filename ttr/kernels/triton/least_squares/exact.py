"""The exact solve, token by token inside a chunk: for the solvers `cholesky` and `rls`, of a gate of any kind."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import LOG2E, NAN_STAYS, load_block, locate, sequence

LEAST_PIVOT = tl.constexpr(2.0**-23)  # of a diagonal's own entry: what is smaller is rounding
NO_GATE, OF_HEAD, OF_CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def inverse(M, channels, count):
    """Of a symmetric positive M [BLOCK, BLOCK], its first `count` channels swept one after another; -1 times what is behind them.

    A sweep turns M into -M^-1 channel by channel and leaves it symmetric: with c its column j, but c_j = -1, M_ij becomes
    M_ij - c_i c_j / pivot, where row and column j count as 0. Without pivoting, which a positive M does not need.
    """
    diagonal = tl.sum(tl.where(channels[:, None] == channels[None, :], M, 0.0), 1)
    for j in range(count):
        here = channels == j
        column = tl.sum(tl.where(here[None, :], M, 0.0), 1)
        least = tl.sum(tl.where(here, diagonal, 0.0), 0) * LEAST_PIVOT
        pivot = tl.maximum(tl.sum(tl.where(here, column, 0.0), 0), least, NAN_STAYS)
        column = tl.where(here, -1.0, column)
        M = tl.where(here[:, None] | here[None, :], 0.0, M) - (column * (1.0 / pivot))[:, None] * column[None, :]
    return -M


@triton.jit
def solved(H, P, ridge, query, channels, DK: tl.constexpr, GATE: tl.constexpr):
    """x of one query, and once more of what is left of it: under a small ridge P is large and much cancels."""
    if GATE != NO_GATE:
        P = inverse(with_ridge(H, ridge, channels), channels, DK)
    x = tl.sum(P * query[None, :], 1)
    left = query - tl.sum(H * x[None, :], 1) - ridge * x
    return x + tl.sum(P * left[None, :], 1)


@triton.jit
def with_ridge(H, ridge, channels):
    return H + tl.where(channels[:, None] == channels[None, :], ridge[:, None], 0.0)


@kernel("N T scale weight_stride decay_stride")
def solve_exactly_kernel(
    q, k, states, sizes, log_decay, weight, ridge, x, other, dridge, cu_seqlens, N, T, scale, weight_stride, decay_stride,
    HQ: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    WEIGHTED: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program, all in float32: x_t = scale (H_t + Lambda)^-1 q_t, H_t carried from token to token.

        H <- e H e + w k k^T,  P = (H + Lambda)^-1, e the square root of the decay; without a gate P once, and from token to
        token Sherman and Morrison's P <- P - w (P k)(P k)^T / (1 + w <k, P k>)

    states, sizes: H before every chunk, [chunks, Hv, dk, dk], divided by `sizes` [chunks, Hv], if that is not None. log_decay:
    [Hv] or [tokens, Hv], with [.., dk] of a channel. ridge, x, other, dridge: of `solve_kernel`.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    channels = tl.arange(0, BK)
    there = channels < DK
    place = slot.to(tl.int64) * HV + head
    given = tl.zeros([BK], tl.float32)
    if chunk * C >= length:
        if dridge is not None:
            tl.store(dridge + place * DK + channels, given, mask=there)
        return
    own = tl.load(ridge + head * DK + channels, mask=there, other=1.0)
    gram = load_block(states + place * DK * DK, channels, channels, DK, DK)
    if sizes is not None:
        gram *= tl.load(sizes + place)
    P = inverse(with_ridge(gram, own, channels), channels, DK) if GATE == NO_GATE else gram

    for t in range(tl.minimum(length - chunk * C, C)):
        token = first + chunk * C + t
        query = tl.load(q + (token * HQ + head // (HV // HQ)) * DK + channels, mask=there, other=0.0) * scale
        key = tl.load(k + (token * H + head // (HV // H)) * DK + channels, mask=there, other=0.0)
        w = tl.load(weight + token * weight_stride + head) if WEIGHTED else 1.0
        if READ_BEFORE:
            solution = solved(gram, P, own, query, channels, DK, GATE)
        if GATE == NO_GATE:
            moved = tl.sum(P * key[None, :], 1)
            P -= (moved * (w / (1.0 + w * tl.sum(moved * key, 0))))[:, None] * moved[None, :]
        elif GATE == OF_HEAD:
            gram *= tl.exp2(tl.load(log_decay + token * decay_stride + head) * LOG2E)
        else:
            decay = tl.load(log_decay + token * decay_stride + head * DK + channels, mask=there, other=0.0).to(tl.float32)
            root = tl.exp2(decay * (0.5 * LOG2E))
            gram *= root[:, None] * root[None, :]
        gram += (w * key)[:, None] * key[None, :]
        if not READ_BEFORE:
            solution = solved(gram, P, own, query, channels, DK, GATE)
        at = (token * HV + head) * DK + channels
        tl.store(x + at, solution, mask=there)
        if dridge is not None:
            given -= solution * tl.load(other + at, mask=there, other=0.0)
    if dridge is not None:
        tl.store(dridge + place * DK + channels, given, mask=there)
