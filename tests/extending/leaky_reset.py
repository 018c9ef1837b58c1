"""A brand-new forgetting gate, as a user would write it: one file, nothing of ttr touched."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import ttr


@ttr.gate("leaky_reset")
@dataclass(frozen=True, kw_only=True)
class LeakyReset(ttr.Gate):
    """Keeps exp(-leak) of the memory, and of that only what a reset in (0, 1) leaves: log_decay = -leak + log(1 - reset)."""

    per_key: ClassVar[bool] = True
    leak: ttr.Signal = ttr.signal("softplus", bias=-4.0, per="key")
    reset: ttr.Signal = ttr.signal("sigmoid", bias=-4.0, per="key")

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return -signals["leak"] + torch.log1p(-signals["reset"])
