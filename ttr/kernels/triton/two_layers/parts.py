"""How a head's hidden units are shared among the programs of a scan, and how much is done at a time; importable without triton."""

from __future__ import annotations

from typing import Any

import torch

from ....constant import constant
from ..shapes import ceil_div

UNITS = 64  # hidden units of a program
AT_A_TIME = 4096  # programs of a scan x mini-batches of a group: enough reads for any GPU, and what is made of a group stays small
ON_CPU = 1024  # heads at a time, where nothing limits them


def parts_of(hidden: int, device: int) -> int:
    """Programs of a head: each keeps what it has of the memory in registers. On a CPU one: programs run one after another there."""
    return 1 if device < 0 else ceil_div(hidden, UNITS)


@constant
def heads_at_once(hidden: int, device: int) -> int:
    """How many heads' programs run at the same time, one a multiprocessor. Raises ValueError where not even one's do."""
    if device < 0:
        return ON_CPU
    processors, parts = torch.cuda.get_device_properties(device).multi_processor_count, parts_of(hidden, device)
    if parts > processors:
        raise ValueError(
            f"path='triton' takes one multiprocessor for every {UNITS} hidden units: the regressor has {hidden}, this GPU {processors} "
            f"multiprocessors; choose up to {UNITS * processors} hidden units, or path='dual'"
        )
    return processors // parts


def group_of(batches: Any, hidden: int, device: int) -> Any:
    """Mini-batches of a group, all about alike. batches: of a sequence; it may be a symbol."""
    several = max(1, AT_A_TIME // (heads_at_once(hidden, device) * parts_of(hidden, device)))
    return ceil_div(batches, ceil_div(batches, several))
