"""The chunk path against the per-token loop on the CPU: forward and backward of the delta rule under every gate, and least squares.

    python -m experiments.bench.chunk [--output experiments/bench/results/chunk_cpu.json]

T = 2048, H = 4, D = 64, float32, one sequence. Prints how many times faster the chunks are.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ttr import testing

T, H, D = 2048, 4, 64
DECLARATIONS = {
    "delta rule": {"optimizer": "delta"},
    "delta rule, scalar gate": {"optimizer": "delta", "gate": "scalar"},
    "delta rule, vector gate": {"optimizer": "delta", "gate": "vector"},
    "mesa (exact least squares)": "mesa",
    "mesanet (30 conjugate gradients)": "mesanet",
}


def seconds(declaration: Any, path: str, repeats: int, warm_up: int) -> tuple[float, float]:
    """Median seconds of (forward, forward + backward) after the warm-up."""
    case = testing.random_inputs(declaration, T=T, B=1, H=H, Hv=H, dk=D, dv=D, extreme=False, correlation=0.0, state=False)
    case = case.to(torch.float32)
    if "step" in case.tensors:
        case.tensors["step"] *= 0.5  # up to 1: nothing overshoots
    for x in (*case.tensors.values(), *case.params.values()):
        x.requires_grad_()
    forward, both = [], []
    for i in range(warm_up + repeats):
        start = time.perf_counter()
        o, _ = testing.call(case, path)
        middle = time.perf_counter()
        o.square().sum().backward()
        if i >= warm_up:
            forward.append(middle - start)
            both.append(time.perf_counter() - start)
    return statistics.median(forward), statistics.median(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for name in track(DECLARATIONS, description="declarations", console=Console(stderr=True)):
        chunk_forward, chunk_both = seconds(DECLARATIONS[name], "chunk", args.repeats, warm_up=1)
        loop_forward, loop_both = seconds(DECLARATIONS[name], "recurrent", 1, warm_up=0)
        rows.append({
            "declaration": name, "chunk_forward_ms": 1e3 * chunk_forward, "chunk_both_ms": 1e3 * chunk_both,
            "recurrent_forward_ms": 1e3 * loop_forward, "recurrent_both_ms": 1e3 * loop_both, "ratio_both": loop_both / chunk_both,
        })  # fmt: skip
    table = Table(
        "declaration",
        "chunk fwd ms",
        "chunk fwd+bwd ms",
        "recurrent fwd+bwd ms",
        "times faster",
        title=f"T={T} H={H} D={D} float32, CPU",
    )
    for r in rows:
        table.add_row(
            r["declaration"],
            *(f"{r[k]:.0f}" for k in ("chunk_forward_ms", "chunk_both_ms", "recurrent_both_ms")),
            f"{r['ratio_both']:.0f}",
        )
    Console().print(table)
    if args.output:
        report = {
            "command": f"python -m experiments.bench.chunk --output {args.output}", "date": datetime.date.today().isoformat(),
            "torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": platform.machine(),
            "python": platform.python_version(), "T": T, "H": H, "D": D, "dtype": "float32", "rows": rows,
        }  # fmt: skip
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
