"""The scan: what every token reads, the last slots, the slots before every so many tokens."""

import triton
import triton.language as tl

from ..launch import kernel
from .event import advance, load_numbers, load_row, row_of


@kernel("T heads every")
def forward_kernel(
    q, x, w, v, A, b, c, read, known, known_key, known_value, first, o, last, checkpoints, T, heads, every,
    STEPS: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    Q1: tl.constexpr, Q2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, SOLVE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """One head and tile of value channels a program. o, last or checkpoints are None where nobody wants them.

    q: [heads, T, DK]; x, w, known_key: [heads, T STEPS, DK]; v, known_value: [heads, T STEPS, DV]; A: [R, R, heads, T STEPS, A1, A2],
    b, c, known likewise with one R; read: [R, heads, T, Q1, Q2]; first, last: [R, heads, DK, DV]; o: [heads, T, DV];
    checkpoints: [ceil(T / every), R, heads, DK, DV].
    """
    head = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, R)[:, None, None].to(tl.int64)
    keys = tl.arange(0, BK)[None, :, None]
    values = (tl.program_id(0) * BV + tl.arange(0, BV))[None, None, :]
    inside = (slot >= 0) & (keys < DK) & (values < DV)
    place = (slot * heads + head) * (DK * DV) + keys * DV + values
    size = heads.to(tl.int64) * (R * DK * DV)
    tokens = heads.to(tl.int64) * T
    z = tl.load(first + place, mask=inside, other=0.0)
    for t in range(T):
        token = head * T + t
        if checkpoints is not None and t % every == 0:
            tl.store(checkpoints + t // every * size + place, z, mask=inside)
        if o is not None and BEFORE:
            store_read(o, z, q, read, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
        for step in range(STEPS):
            z = advance(
                z, x, w, v, A, b, c, known, known_key, known_value, token * STEPS + step, tokens * STEPS,
                slot, keys, values, R, DK, DV, A1, A2, B1, B2, C1, C2, K1, K2, SOLVE,
            )  # fmt: skip
        if o is not None and not BEFORE:
            store_read(o, z, q, read, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
    if last is not None:
        tl.store(last + place, z, mask=inside)


@triton.jit
def store_read(o, z, q, read, token, tokens, slot, keys, values, DK: tl.constexpr, DV: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr):
    """o = q (sum_s read_s z_s)."""
    seen = load_numbers(read, slot, token, tokens, keys, values, Q1, Q2) * z
    tl.store(o + token * DV + values, row_of(seen * load_row(q, token, keys, DK), 1), mask=values < DV)
