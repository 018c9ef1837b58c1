"""How a head's hidden units are shared among the programs of a scan, and how much is done at a time; importable without triton."""

from __future__ import annotations

from typing import Any

import torch

from ....constant import constant
from ..shapes import ceil_div

UNITS = 64  # hidden units of a program
AT_A_TIME = 2112  # programs of a scan x mini-batches of a group: enough reads for any GPU, and what is made of a group stays small
GROUPS = 32  # of mini-batches, for each round of heads: with many more, what is kept between groups outgrows what one makes
TWO_PROGRAMS = 2 * 97 * 1024  # bytes of shared memory: of two programs, float32's, which need the most
ON_CPU = 1024  # heads at a time, where nothing limits them


def parts_of(hidden: int, device: int) -> int:
    """Programs of a head: each keeps what it has of the memory in registers. On a CPU one: programs run one after another there."""
    return 1 if device < 0 else ceil_div(hidden, UNITS)


@constant
def processors_of(hidden: int, device: int) -> tuple[int, int]:
    """The GPU's multiprocessors, and how many programs of a scan one of them runs at the same time.

    Raises ValueError where not even one head's programs have a multiprocessor each.
    """
    properties, parts = torch.cuda.get_device_properties(device), parts_of(hidden, device)
    processors = properties.multi_processor_count
    if parts > processors:
        raise ValueError(
            f"path='triton' takes one multiprocessor for every {UNITS} hidden units: the regressor has {hidden}, this GPU {processors} "
            f"multiprocessors; choose up to {UNITS * processors} hidden units, or path='dual'"
        )
    return processors, 2 if properties.shared_memory_per_multiprocessor >= TWO_PROGRAMS else 1


def warps_of(heads: int, hidden: int, device: int) -> int:
    """Of a program of a scan over so many heads: half of a multiprocessor is enough where all of it would leave some heads waiting."""
    if device < 0:
        return 8
    processors, programs = processors_of(hidden, device)
    return 8 if programs == 1 or heads * parts_of(hidden, device) <= processors else 4


def heads_at_once(hidden: int, device: int) -> int:
    """How many heads' programs run at the same time."""
    if device < 0:
        return ON_CPU
    processors, programs = processors_of(hidden, device)
    return programs * processors // parts_of(hidden, device)


def group_of(batches: Any, heads: Any, hidden: int, device: int) -> Any:
    """Mini-batches of a group, all about alike. batches: of a sequence; it and heads (of all sequences) may be symbols."""
    most = heads_at_once(hidden, device)
    together: Any = torch.sym_max(1, torch.sym_min(heads, most))
    several: Any = torch.sym_max(AT_A_TIME // (together * parts_of(hidden, device)), batches * ceil_div(heads, most) // GROUPS)
    several = torch.sym_max(1, several)
    return ceil_div(batches, ceil_div(batches, several))


def row_of(sequences: Any, first: Any) -> Any:
    """The numbers of a row of checkpoints, which begins on 16 bytes: of so many sequences, a memory each."""
    return ceil_div(sequences * first[0].numel(), 4) * 4
