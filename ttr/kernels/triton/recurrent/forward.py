"""The scan: what every token reads, the last slots, the slots before every so many tokens."""

import triton
import triton.language as tl

from ..launch import kernel
from ..tiles import sequence
from .event import advance, checkpoint_of, load_numbers, load_row, row_of, row_of_tokens


@kernel("T rows every")
def forward_kernel(
    q, k, v, A, b, c, read, known, known_key, known_value, first, cu_seqlens, o, last, checkpoints, T, rows, every,
    H: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    Q1: tl.constexpr, Q2: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    SOLVE: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One memory and tile of value channels a program; tensors as in `run.Numbers`. o, last, checkpoints: None if nobody wants them."""
    memory = tl.program_id(0).to(tl.int64)
    first_token, length = sequence(cu_seqlens, tl.program_id(0) // H, T, PACKED)  # type: ignore[misc]
    row = row_of_tokens(memory, first_token, T, H, PACKED)
    slot = tl.arange(0, R)[:, None, None].to(tl.int64)
    keys = tl.arange(0, BK)[None, :, None]
    values = (tl.program_id(1) * BV + tl.arange(0, BV))[None, None, :]
    inside = (slot >= 0) & (keys < DK) & (values < DV)
    place = (slot * tl.num_programs(0) + memory) * (DK * DV) + keys * DV + values
    tokens = rows.to(tl.int64) * T
    z = tl.load(first + place, mask=inside, other=0.0)
    for t in range(length):
        token = row + t
        if checkpoints is not None and t % every == 0:
            kept = checkpoint_of(slot, memory, first_token, t // every, T, every, keys, values, DK, DV, H, PACKED)
            tl.store(checkpoints + kept, z, mask=inside)
        if o is not None and BEFORE:
            store_read(o, z, q, read, token, tokens, slot, keys, values, DK, DV, Q1, Q2)
        for step in range(STEPS):
            z = advance(
                z, k, v, A, b, c, known, known_key, known_value, token * STEPS + step, tokens * STEPS,
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
