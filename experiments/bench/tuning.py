"""Peers tune themselves at their first call: what their autotuner is about to time is compiled in many threads beforehand.

Triton compiles one configuration after another, which for an op of fla takes minutes. What is timed, and what is chosen, stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Inside, every triton.autotune'd kernel compiles all of its configurations at once; one that does not compile is left to the tuner."""
    from triton import AsyncCompileMode  # here: tables are looked at where triton is not installed
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        given = {name: x for name, x in kwargs.items() if name != "warmup"}
        with AsyncCompileMode(threads, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **given, **config.all_kwargs())
        return configs

    with ThreadPoolExecutor(os.cpu_count()) as threads, mock.patch.object(Autotuner, "prune_configs", prune_configs):
        yield
