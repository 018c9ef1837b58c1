"""Which tokens read in a chunk of events, and where: with STEPS events a token not every event is read.

A chunk is C events whatever STEPS; it may begin and end inside a token. A token reads in the chunk of its last event, after
it (READ_BEFORE: of its first, before it). So those who read in a chunk are neighbours: the first rows of a tile of R. The rows
behind them are the next chunk's; where R STEPS = C there are none.
"""

import triton
import triton.language as tl

from ..tiles import store_rows


@triton.jit
def readers_of(chunk, length, C: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, READ_BEFORE: tl.constexpr):
    """The first token that reads in a chunk and, for the R from there, the event of the chunk it reads at and whether there is one."""
    r = tl.arange(0, R)
    if STEPS == 1:
        return chunk * C, r, chunk * C + r < length
    else:
        READ: tl.constexpr = (STEPS - 1) * (not READ_BEFORE)
        row = (chunk * C + (STEPS - 1 - READ)) // STEPS
        at = r * STEPS + (row * STEPS + READ - chunk * C)
        return row, at, (at < C) & (chunk * C + at < length)


@triton.jit
def read_decays(
    decays, head, event, at, reads, G, before, HV: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr, READ_BEFORE: tl.constexpr
):
    """[R], the summed log2 decays up to where each row reads. A row that reads nothing here has -inf: all it multiplies is zero.

    event: the chunk's first; G, before: of `load_decays`.
    """
    if STEPS == 1:
        return before if READ_BEFORE else G
    else:
        seen = tl.zeros_like(at).to(tl.float32)
        if GATED:
            last = at - 1 if READ_BEFORE else at
            seen = tl.load(decays + (event + last) * HV + head, mask=reads & (last >= 0), other=0.0)
        return tl.where(reads, seen, float("-inf"))


@triton.jit
def only(x, reads, C: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr):
    """Rows of a tile of R, zero where they are the next chunk's."""
    if R * STEPS == C:
        return x
    else:
        return tl.where(reads[:, None], x, 0.0)


@triton.jit
def store_answers(
    matrix, base, origin, row, column, x, reads,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix of `tokens_of`; where some are the next chunk's, by pointers (base, from the token `origin` on) and masked."""
    if R * STEPS == C:
        matrix.store([row, column], x)
    else:
        store_rows(base, origin + row, x, tl.arange(0, R), reads, column + tl.arange(0, BLOCK), STRIDE, D, BLOCK)
