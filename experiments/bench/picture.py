"""speed.png: time and multiple of the memory floor over the length of the sequence, one column a mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.bench.cases import CASES
from experiments.bench.record import Row
from experiments.bench.shapes import SHAPES
from experiments.report import GREEN, GREY, INK, ORANGE, STYLE

COLOURS = {"ttr": GREEN, "fla": ORANGE, "flash_qla": "#4a6fa5", "torch": "#9a9a9a"}
LABELS = {"ttr": "ttr", "fla": "flash-linear-attention", "flash_qla": "FlashQLA", "torch": "causal softmax (torch)"}
LINES = {"both": ("-", "o"), "forward": ("--", "")}


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Sizes that differ from 16 heads of 128 channels are in the table alone. Nothing is written where no time is there."""
    timed = [row for row in rows if row["kind"] in LINES and "ms" in row and SHAPES[row["shape"]].plain]
    cases = [name for name, case in CASES.items() if case.declaration is not None and any(row["case"] == name for row in timed)]
    if not cases:
        return
    names = [name for name, _ in sorted(SHAPES.items(), key=lambda item: item[1].T) if any(row["shape"] == name for row in timed)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(cases), figsize=(2.6 + 4.1 * len(cases), 7.6), sharex=True, sharey="row", squeeze=False)
        for (top, bottom), case in zip(axes.T, cases, strict=True):
            for who in COLOURS:
                for kind, (style, marker) in LINES.items():
                    mine = {row["shape"]: row for row in timed if (row["case"], row["who"], row["kind"]) == (case, who, kind)}
                    if who == "torch":
                        mine = {row["shape"]: row for row in timed if (row["who"], row["kind"]) == (who, kind)}
                    at = [i for i, name in enumerate(names) if name in mine]
                    ms = [mine[names[i]]["ms"] for i in at]
                    times = [mine[names[i]]["ms"] / mine[names[i]]["floor_ms"] for i in at]
                    ours = who == "ttr"
                    look: Any = {"ls": style, "marker": marker, "ms": 6, "color": COLOURS[who], "lw": 2.6 if ours else 1.6}
                    top.plot(at, ms, **look)
                    bottom.plot(at, times, **look)
            top.set_title(CASES[case].title)
            bottom.set_xticks(range(len(names)), [name.replace("x", "×") for name in names])
            bottom.set_xlabel("sequences × tokens")
            bottom.axhline(1, color=INK, lw=1.2)
            for axis in (top, bottom):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.yaxis.set_minor_formatter(NullFormatter())
                axis.grid(axis="y", color=GREY, lw=0.7)
                axis.set_xlim(-0.4, len(names) - 0.6)
        axes[0][0].set_ylabel("milliseconds")
        axes[1][0].set_ylabel("× floor")
        there = [who for who in COLOURS if any(row["who"] == who for row in timed)]
        handles = [Line2D([], [], color=COLOURS[who], lw=2.6 if who == "ttr" else 1.6, label=LABELS[who]) for who in there]
        handles += [
            Line2D([], [], color=INK, lw=1.6, marker="o", ms=6, label="forward and backward"),
            Line2D([], [], color=INK, lw=1.6, ls="--", label="forward"),
            Line2D([], [], color=INK, lw=1.2, label="floor: inputs and outputs moved once"),
        ]
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=14)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
        plt.close(figure)
