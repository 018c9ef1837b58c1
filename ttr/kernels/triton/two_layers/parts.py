"""How a head's hidden units are shared among the programs of a scan, and how much is done at a time; importable without triton."""

from __future__ import annotations

from typing import Any

import torch

from ....constant import constant
from ..shapes import ceil_div

UNITS = 64  # hidden units of a program
READS_AT_A_TIME = 528  # heads x mini-batches of a group: enough reads for any GPU, and what is made of a group stays small
ON_CPU = 1024  # heads at a time, where nothing limits them


def parts_of(hidden: int, device: int) -> int:
    """Programs of a head: each keeps what it has of the memory in registers. On a CPU one: programs run one after another there."""
    return 1 if device < 0 else ceil_div(hidden, UNITS)


@constant
def processors_of(hidden: int, device: int) -> int:
    """The GPU's multiprocessors. Raises ValueError where not even one head's programs have one each."""
    processors, parts = torch.cuda.get_device_properties(device).multi_processor_count, parts_of(hidden, device)
    if parts > processors:
        raise ValueError(
            f"path='triton' takes one multiprocessor for every {UNITS} hidden units: the regressor has {hidden}, this GPU {processors} "
            f"multiprocessors; choose up to {UNITS * processors} hidden units, or path='dual'"
        )
    return processors


def warps_of(heads: int, hidden: int, device: int) -> int:
    """Of a program of a scan over so many heads: half of a multiprocessor is enough where all of it would leave some heads waiting."""
    return 8 if device < 0 or heads * parts_of(hidden, device) <= processors_of(hidden, device) else 4


def heads_at_once(hidden: int, device: int) -> int:
    """How many heads' programs run at the same time, two a multiprocessor."""
    return ON_CPU if device < 0 else 2 * processors_of(hidden, device) // parts_of(hidden, device)


def group_of(batches: Any, heads: Any, hidden: int, device: int) -> Any:
    """Mini-batches of a group, all about alike. batches: of a sequence; it and heads may be symbols."""
    together = torch.sym_min(heads, heads_at_once(hidden, device))
    several = torch.sym_max(1, READS_AT_A_TIME // torch.sym_max(1, together))
    return ceil_div(batches, ceil_div(batches, several))
