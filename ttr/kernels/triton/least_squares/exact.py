"""The exact solve, token by token inside a chunk: for the solvers `cholesky` and `rls`, of a gate of any kind."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import LOG2E, NAN_STAYS, load_block, locate, sequence

LEAST_PIVOT = tl.constexpr(2.0**-23)  # of a diagonal's own entry: what is smaller is rounding
NO_GATE, OF_HEAD, OF_CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def solved(M, b, channels, count):
    """x of M x = b by elimination, for a symmetric positive M [BLOCK, BLOCK] of `count` channels; needs no pivoting.

    Step j takes M_ij M_kj / M_jj from what is right of and below j; column j below the diagonal stays for the way back. An inverse
    would take as long and be less exact: under a small ridge it is large, and much of it cancels in x.
    """
    diagonal = tl.sum(tl.where(channels[:, None] == channels[None, :], M, 0.0), 1)
    pivots = diagonal
    for j in range(count):
        here = channels == j
        column = tl.sum(tl.where(here[None, :], M, 0.0), 1)
        least = tl.sum(tl.where(here, diagonal, 0.0), 0) * LEAST_PIVOT
        pivot = tl.maximum(tl.sum(tl.where(here, column, 0.0), 0), least, NAN_STAYS)
        pivots = tl.where(here, pivot, pivots)
        column = tl.where(channels > j, column, 0.0)
        b -= column * (tl.sum(tl.where(here, b, 0.0), 0) / pivot)
        M -= (column * (1.0 / pivot))[:, None] * column[None, :]
    for step in range(count):
        j = count - 1 - step
        here = channels == j
        column = tl.where(channels > j, tl.sum(tl.where(here[None, :], M, 0.0), 1), 0.0)
        left = tl.sum(tl.where(here, b, 0.0), 0) - tl.sum(column * b, 0)
        b = tl.where(here, left / tl.sum(tl.where(here, pivots, 0.0), 0), b)
    return b


@kernel("N T scale weight_stride decay_stride ridge_stride")
def solve_exactly_kernel(
    q, k, states, sizes, log_decay, weight, ridge, x, cu_seqlens, N, T, scale, weight_stride, decay_stride, ridge_stride,
    HQ: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    WEIGHTED: tl.constexpr, READ_BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk and value head a program, all in float32: (H_t + Lambda_t) x_t = scale q_t, H <- e H e + w k k^T from token to token,
    e the square root of the decay.

    states, sizes: H before every chunk, [chunks, Hv, dk, dk], divided by `sizes` [chunks, Hv], if that is not None. log_decay:
    [Hv] or [tokens, Hv], with [.., dk] of a channel. weight: [Hv] or [tokens, Hv]. ridge: Lambda, [Hv, dk] or [tokens, Hv, dk].
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    n, chunk = locate(cu_seqlens, slot, N, T, C, PACKED)
    first, length = sequence(cu_seqlens, n, T, PACKED)
    if chunk * C >= length:
        return
    channels = tl.arange(0, BK)
    there = channels < DK
    place = slot.to(tl.int64) * HV + head
    on_diagonal = channels[:, None] == channels[None, :]
    gram = load_block(states + place * DK * DK, channels, channels, DK, DK)
    if sizes is not None:
        gram *= tl.load(sizes + place)

    for t in range(tl.minimum(length - chunk * C, C)):
        token = first + chunk * C + t
        b = tl.load(q + (token * HQ + head // (HV // HQ)) * DK + channels, mask=there, other=0.0) * scale
        own = tl.load(ridge + token * ridge_stride + head * DK + channels, mask=there, other=1.0)
        if READ_BEFORE:
            solution = solved(gram + tl.where(on_diagonal, own[:, None], 0.0), b, channels, DK)
        if GATE == OF_HEAD:
            gram *= tl.exp2(tl.load(log_decay + token * decay_stride + head) * LOG2E)
        if GATE == OF_CHANNEL:
            decay = tl.load(log_decay + token * decay_stride + head * DK + channels, mask=there, other=0.0).to(tl.float32)
            root = tl.exp2(decay * (0.5 * LOG2E))
            gram *= root[:, None] * root[None, :]
        key = tl.load(k + (token * H + head // (HV // H)) * DK + channels, mask=there, other=0.0)
        w = tl.load(weight + token * weight_stride + head) if WEIGHTED else 1.0
        gram += (w * key)[:, None] * key[None, :]
        if not READ_BEFORE:
            solution = solved(gram + tl.where(on_diagonal, own[:, None], 0.0), b, channels, DK)
        tl.store(x + (token * HV + head) * DK + channels, solution, mask=there)
