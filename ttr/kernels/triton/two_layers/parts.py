"""How a head's hidden units are shared among the programs of a scan, importable without triton."""

from __future__ import annotations

import torch

from ....constant import constant
from ..shapes import ceil_div

UNITS = 64  # hidden units of a program
ON_CPU = 1024  # heads at a time, where nothing limits them


def parts_of(hidden: int, device: int) -> int:
    """Programs of a head: each keeps what it has of the memory in registers. On a CPU one: programs run one after another there."""
    return 1 if device < 0 else ceil_div(hidden, UNITS)


@constant
def heads_at_once(hidden: int, device: int) -> int:
    """How many heads' programs run at the same time, one a multiprocessor."""
    if device < 0:
        return ON_CPU
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // parts_of(hidden, device))
