"""The files that a run ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.bench import picture, tables
from experiments.bench.cases import CASES
from experiments.bench.record import Row

LEGEND = """\
Medians; bf16, gates float32; sequences × tokens, 16 heads of 128 channels unless the name says otherwise (h: heads, hv: value
heads, d: channels). "floor": q, k, v, o, what else has channels (and their gradients) moved once at the speed of a copy on this device,
{bandwidth:.2f} TB/s.
"ours / it": below 1 ours takes less. "peak": memory of one forward and backward beside the inputs.
"differs from ours": relative difference of the outputs, Frobenius. Decoding states that fit the L2 cache can beat their floor.
"of matmul": achieved rate over that of a large torch.matmul in bf16 in the same run{matmul}. "path": what ours took.

"""


def write(folder: Path, rows: Sequence[Row]) -> list[str]:
    """table.md, results.json and, where there are times to draw, speed.png and growth.png; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [row for row in rows if row["kind"] == "run"]
    routes = sorted({row["text"] for row in rows if row["kind"] == "route"})
    measurements = [row for row in rows if row["kind"] not in ("run", "route")]
    last = runs[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    title = f"{last['gpu']}: {versions}"

    rate = last.get("matmul_tflop_s")  # not in the records of earlier versions
    legend = LEGEND.format(bandwidth=last["bandwidth_tb_s"], matmul="" if rate is None else f", {rate:.0f} TFLOP/s")
    commands = "\n    ".join(dict.fromkeys(row["command"] for row in runs))
    text = f"{title}, {last['date']}\n\n    {commands}\n\n{legend}"
    text += "".join(f"- fla hands over: {route}\n" for route in routes)
    text += "".join(f"- left out: {line}\n" for line in last["left_out"])
    measured = {row["case"] for row in measurements}
    text += "".join(f"- {name}: {case.remark}\n" for name, case in CASES.items() if case.remark and name in measured)
    text += "".join("\n" + tables.markdown(sheet) for sheet in tables.sheets(measurements))
    (folder / "table.md").write_text(text)
    report = {"runs": runs, "fla_backends": routes, "rows": measurements}
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    picture.draw(folder / "speed.png", measurements, title)
    picture.draw_growth(folder / "growth.png", measurements, title)
    return [name for name in ("table.md", "results.json", "speed.png", "growth.png") if (folder / name).exists()]
