"""Sums over the programs that share a head, each with some of its hidden units."""

import triton
import triton.language as tl

from ..tiles import load_rows, store_rows


@triton.jit
def scan_place_of(heads, HV: tl.constexpr, PARTS: tl.constexpr):
    """Of a program in a scan's grid, PARTS a head: its head among the group's and how many those are, its part of it; its sequence
    and its head there."""
    local = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    return local, tl.num_programs(0) // PARTS, part, (heads + local) // HV, (heads + local) % HV


@triton.jit
def summed(x, partial, arrived, step, part, local, t, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The sum of the programs' x, [ROWS, BLOCK], in the same order for all of them: bitwise the same, from run to run too.

    partial: [2, heads, PARTS, ROWS, BLOCK], float32; a step writes where the one before the last did, which all have read.
    arrived: [heads], int32, zero before the launch; all programs of a head must run at the same time (a cooperative launch).
    What a thread wrote before, all of its program may read behind it.
    """
    if PARTS == 1:
        tl.debug_barrier()  # here too: what one thread wrote, the others read
        return x
    else:
        inside = t >= 0
        here = partial + ((step % 2) * (tl.num_programs(0) // PARTS) + local).to(tl.int64) * PARTS * ROWS * BLOCK
        store_rows(here, part * ROWS, x, t, inside, columns, BLOCK, BLOCK, BLOCK)
        tl.debug_barrier()
        tl.atomic_add(arrived + local, 1, sem="release")
        while tl.atomic_add(arrived + local, 0, sem="acquire") < PARTS * (step + 1):
            pass
        tl.debug_barrier()
        total = load_rows(here, 0, t, inside, columns, BLOCK, BLOCK, BLOCK)
        for other in tl.static_range(1, PARTS):
            total += load_rows(here, other * ROWS, t, inside, columns, BLOCK, BLOCK, BLOCK)
        return total
