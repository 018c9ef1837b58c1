"""Which peers are there, what they decline, and the one check of theirs that stands in the way of a timing."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from experiments.bench.case import Case
from experiments.bench.shapes import Shape

GROUPED = ("gated_delta", "kda")  # where fla takes more value heads than key heads
PEERS = ("fla", "flash_qla", "torch", "titans_pytorch")
CHECK_REMOVED = "check removed, speed only"


def peer_of(who: str) -> str:
    """fla of fla-fused: one peer may be called in several ways, ttr with other declarations."""
    return who.partition("-")[0]


def problem(peer: str) -> str | None:
    """Why a peer cannot be imported, or None. flash_qla raises more than ImportError: it asks nvcc and the device."""
    if peer == "fla":
        os.environ["FLA_FLASH_QLA"] = "0"  # else fla hands gated_delta to flash_qla where that is installed
    try:
        importlib.import_module({"fla": "fla.ops"}.get(peer, peer))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def declines(who: str, case: Case, shape: Shape) -> str | None:
    """Why a contender does not run a shape by its documentation, or None."""
    if shape.grouped and (who == "torch" or (peer_of(who) == "fla" and case.name not in GROUPED)):
        return "takes no more value heads than key heads"
    if who == "flash_qla" and (shape.dk, shape.dv) != (128, 128):
        return "takes head size 128 only"
    return None


def refused_by_check(who: str, error: Exception) -> bool:
    """Whether fla refused its gated backward because of this Triton on Hopper (its issue 640)."""
    return peer_of(who) == "fla" and isinstance(error, RuntimeError) and "#640" in str(error)


@contextmanager
def check_removed() -> Iterator[None]:
    """Lets fla run its gated backward on Hopper with the Triton it refuses: the times stand, the gradients may be wrong."""
    module: Any = importlib.import_module("fla.ops.common.chunk_o")
    before = module.TRITON_ABOVE_3_7_1
    module.TRITON_ABOVE_3_7_1 = True
    try:
        yield
    finally:
        module.TRITON_ABOVE_3_7_1 = before


class Routes(logging.Handler):
    """Collects what fla logs, once a process, when it hands an operation to another backend (tilelang)."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.new: list[str] = []
        logger = logging.getLogger("fla.backends")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if " -> " in (text := record.getMessage()) and "rejected" not in text:
            self.new.append(text.removeprefix("[FLA Backend] "))

    def take(self) -> list[str]:
        new, self.new = self.new, []
        return new
