"""The first call of a fresh process with empty caches, forward and backward: compilation and tuning as a user meets them.

    python -m experiments.bench.cold CASE SHAPE WHO

is the child process: it imports and makes its inputs first, then prints one JSON line.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from experiments.bench import peers
from experiments.bench.case import Case
from experiments.bench.cases import CASES
from experiments.bench.record import Row, with_notes
from experiments.bench.shapes import SHAPES, Shape

LIMIT_S = 400
ROOT = Path(__file__).parents[2]


def cold(case: Case, shape: Shape, who: str) -> Row:
    """Seconds of the first call and milliseconds of the second, on the wall clock; a child that fails raises RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR")}
        command = [sys.executable, "-m", "experiments.bench.cold", case.name, shape.name, who]
        child = subprocess.run(command, env={**os.environ, **caches}, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1])
    figures = json.loads(child.stdout.strip().splitlines()[-1])
    return {"kind": "cold", "case": case.name, "shape": shape.name, "who": who, **figures}


def child(case: Case, shape: Shape, who: str) -> Row:
    if problem := who != "ttr" and peers.problem(peers.peer_of(who)):
        raise RuntimeError(problem)
    importlib.import_module("triton")
    x = case.inputs(shape, requires_grad=True)
    contender = case.contender(who, x)
    upstream = torch.randn_like(x.like_output)
    notes = [case.note(who, shape)]
    figures: Row = {}

    def both() -> None:
        torch.autograd.grad(contender.call(), contender.leaves, upstream)
        torch.cuda.synchronize()

    with ExitStack() as stack:
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            both()
        except RuntimeError as error:
            if not peers.refused_by_check(who, error):
                raise
            stack.enter_context(peers.check_removed())
            notes.append(peers.CHECK_REMOVED)
            both()
        figures["first_s"] = time.perf_counter() - start
        start = time.perf_counter()
        both()
        figures["second_ms"] = 1e3 * (time.perf_counter() - start)
    return with_notes(figures, notes)


if __name__ == "__main__":
    print(json.dumps(child(CASES[sys.argv[1]], SHAPES[sys.argv[2]], sys.argv[3])))
