"""One column a mechanism: speed.png, time and multiple of the memory floor over the shapes; growth.png, time a token over T."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.bench.cases import CASES
from experiments.bench.growth import growths
from experiments.bench.record import Row
from experiments.bench.shapes import SHAPES
from experiments.report import GREEN, GREY, INK, ORANGE, STYLE

COLOURS = {
    "ttr": GREEN, "fla": ORANGE, "fla-fused": "#b07a2a", "flash_qla": "#4a6fa5", "torch": "#9a9a9a",
    "titans_pytorch": "#4a6fa5", "titans_pytorch-b64": "#8a5a9a", "ttr-gated_delta": "#8fbf9f", "ttr-compiled": "#8fbf9f",
    "fla-bounded": "#d9a066",
}  # fmt: skip
LABELS = {
    "ttr": "ttr", "fla": "flash-linear-attention", "fla-fused": "flash-linear-attention, fused", "flash_qla": "FlashQLA",
    "torch": "causal softmax (torch)", "titans_pytorch": "titans-pytorch", "titans_pytorch-b64": "titans-pytorch, batch_size=64",
    "ttr-gated_delta": "ttr, gated delta rule", "ttr-compiled": "ttr, torch.compile",
    "fla-bounded": "flash-linear-attention, told that decays are bounded",
}  # fmt: skip
LINES = {"both": {"ls": "-", "marker": "o", "ms": 6}, "forward": {"ls": "--", "marker": "o", "ms": 5, "mfc": "white"}}


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Sizes that differ from 16 heads of 128 channels are in the table alone. Nothing is written where no time is there."""
    timed = [row for row in rows if row["kind"] in LINES and "ms" in row and "floor_ms" in row and SHAPES[row["shape"]].plain]
    cases = [name for name, case in CASES.items() if "ttr" in case.who and any(row["case"] == name for row in timed)]
    if not cases:
        return
    names = [name for name, _ in sorted(SHAPES.items(), key=lambda item: item[1].T) if any(row["shape"] == name for row in timed)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(cases), figsize=(2.6 + 4.1 * len(cases), 7.6), sharex=True, sharey="row", squeeze=False)
        for (top, bottom), case in zip(axes.T, cases, strict=True):
            for who in COLOURS:
                for kind, line in LINES.items():
                    mine = {row["shape"]: row for row in timed if (row["case"], row["who"], row["kind"]) == (case, who, kind)}
                    if who == "torch":
                        mine = {row["shape"]: row for row in timed if (row["who"], row["kind"]) == (who, kind)}
                    at = [i for i, name in enumerate(names) if name in mine]
                    ms = [mine[names[i]]["ms"] for i in at]
                    times = [mine[names[i]]["ms"] / mine[names[i]]["floor_ms"] for i in at]
                    ours = who == "ttr"
                    look: Any = {**line, "color": COLOURS[who], "lw": 2.6 if ours else 1.6}
                    top.plot(at, ms, **look)
                    bottom.plot(at, times, **look)
            top.set_title(CASES[case].title)
            bottom.set_xticks(range(len(names)), [name.replace("x", "×") for name in names])
            bottom.set_xlabel("sequences × tokens")
            bottom.axhline(1, color=INK, lw=1.2)
            for axis in (top, bottom):
                _scale(axis)
                axis.set_xlim(-0.4, len(names) - 0.6)
        axes[0][0].set_ylabel("milliseconds")
        axes[1][0].set_ylabel("× floor")
        handles = _handles([who for who in COLOURS if any(row["who"] == who for row in timed)])
        handles.append(Line2D([], [], color=INK, lw=1.2, label="floor: inputs and outputs moved once"))
        _save(figure, path, handles, title)


def draw_growth(path: Path, rows: Sequence[Row], title: str) -> None:
    """Nothing is written where nothing was timed at several lengths."""
    found = growths(rows)
    cases = [name for name in CASES if any(g.case == name for g in found)]
    if not cases:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(cases), figsize=(2.6 + 4.1 * len(cases), 4.2), squeeze=False)
        for axis, case in zip(axes[0], cases, strict=True):
            lengths = sorted({T for g in found if g.case == case for T in g.ns})
            for g in found:
                if g.case == case:
                    look: Any = {**LINES[g.kind], "color": COLOURS[g.who], "lw": 2.6 if g.who == "ttr" else 1.6}
                    axis.plot([lengths.index(T) for T in g.ns], list(g.ns.values()), **look)
            axis.set_title(CASES[case].title)
            axis.set_xticks(range(len(lengths)), [str(T) for T in lengths])
            axis.set_xlabel("tokens of a sequence, as many in all")
            _scale(axis)
        axes[0][0].set_ylabel("nanoseconds a token")
        _save(figure, path, _handles([who for who in COLOURS if any(g.who == who for g in found)]), title)


def _scale(axis: Any) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color=GREY, lw=0.7)


def _handles(whos: Sequence[str]) -> list[Line2D]:
    return [
        *(Line2D([], [], color=COLOURS[who], lw=2.6 if who == "ttr" else 1.6, label=LABELS[who]) for who in whos),
        Line2D([], [], color=INK, lw=1.6, label="forward and backward", **LINES["both"]),
        Line2D([], [], color=INK, lw=1.6, label="forward", **LINES["forward"]),
    ]


def _save(figure: Any, path: Path, handles: Sequence[Line2D], title: str) -> None:
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=14)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)
