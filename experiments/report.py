"""The table and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.markup import escape
from rich.table import Table

from experiments.compare import Size, Summary
from experiments.tasks.untrained import UntrainedResult

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

GREEN, ORANGE, GREY, INK = "#2a7f62", "#e08a3c", "#dcdcdc", "#222222"
FEW_SLICES = 2  # updated and kept
PANEL_TITLES = {"updated": "keys that were rewritten", "kept": "keys that were not"}
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def size_table(sizes: Sequence[Size], runs: int, finished: int) -> Table:
    """What `--dry-run` shows."""
    table = Table(title=f"{runs} runs, {finished} of them finished")
    table.add_column("mixer")
    for column in ("parameters", "state bytes / sequence"):
        table.add_column(column, justify="right")
    for size in sizes:
        table.add_row(escape(size.label), f"{size.parameters:,}", f"{size.state_bytes:,}")
    return table


def result_table(summaries: Sequence[Summary], title: str, score: str = "accuracy") -> Table:
    """The score per slice: mean over the seeds, with the standard deviation where there is more than one.

    The shares of outdated answers are left to results.csv where there are many slices.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("mixer")
    for column in ("parameters", "state\nbytes"):
        table.add_column(column, justify="right")
    names = list(summaries[0].mean)
    old_names = list(summaries[0].old) if len(names) <= FEW_SLICES else []
    for name in names:
        table.add_column(f"{score}\n" + name.replace(" ", "\n"), justify="right")
    for name in old_names:
        table.add_column(f"old value\n{name}", justify="right")
    for column in ("lr", "seeds", "training\ntokens/s"):
        table.add_column(column, justify="right")
    for line in summaries:
        cells = [escape(line.label), f"{line.parameters:,}", f"{line.state_bytes:,}"]
        cells += [_mean_sd(line.mean[name], line.sd[name]) for name in names]
        cells += [f"{line.old[name]:.3f}" for name in old_names]
        cells += [f"{line.lr:g}", str(line.seeds), f"{line.tokens_per_second:,.0f}"]
        table.add_row(*cells)
    return table


def _mean_sd(mean: float, sd: float) -> str:
    return f"{mean:.3f}" if math.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


def untrained_table(results: Sequence[UntrainedResult], d: int) -> Table:
    """The three figures of every rule, by number of pairs."""
    counts = list(dict.fromkeys(result.pairs for result in results))
    cells = {(result.rule, result.pairs): result for result in results}
    title = f"Untrained recall of random unit keys, d = {d}: share retrieved / relative error / share newest"
    table = Table(title=title, title_justify="left")
    table.add_column("rule")
    for n in counts:
        table.add_column(f"{n} pairs", justify="right")
    for rule in dict.fromkeys(result.rule for result in results):
        row = [cells[rule, n] for n in counts]
        table.add_row(escape(rule), *(f"{c.retrieval:.2f} / {c.relative_error:.1g} / {c.newest:.2f}" for c in row))
    return table


def draw(path: Path, summaries: Sequence[Summary], title: str, score: str = "accuracy", chance: float | None = None) -> None:
    """SCORE.png: what was answered to rewritten keys, or the score over the slices where nothing is rewritten."""
    with plt.rc_context(STYLE):
        old_slices = list(summaries[0].old)
        few = len(summaries[0].mean) <= FEW_SLICES
        figure = _answers(summaries, title, chance) if old_slices and few else _curves(summaries, title, score)
        _save(figure, path)


def _answers(summaries: Sequence[Summary], title: str, chance: float | None) -> Any:
    """One bar per mixer and slice, divided into right, outdated and other answers; dots are the seeds."""
    names = list(summaries[0].mean)
    height = 1.4 + 0.46 * len(summaries)
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 + 4.2 * len(names), height), sharey=True, squeeze=False)
    rows = range(len(summaries))
    for axis, name in zip(axes[0], names, strict=True):
        right = [line.mean[name] for line in summaries]
        old = [line.old.get(name, 0.0) for line in summaries]
        axis.barh(rows, [1.0] * len(right), color=GREY, height=0.66, label="another value")
        axis.barh(rows, [r + o for r, o in zip(right, old, strict=True)], color=ORANGE, height=0.66, label="old value")
        axis.barh(rows, right, color=GREEN, height=0.66, label="right value")
        for row, line in enumerate(summaries):
            axis.text(0.015, row, f"{line.mean[name]:.2f}", color="white", va="center", fontweight="bold")
            if line.seeds > 1:
                axis.scatter(line.every[name], [row] * line.seeds, s=14, color="white", edgecolor=INK, lw=0.7, zorder=3)
        if name in summaries[0].old:
            axis.axvline(0.5, color=INK, lw=1, ls=(0, (4, 3)))
            axis.text(0.5, -0.62, "a coin toss between old and new", ha="center", va="bottom", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_ylim(len(summaries) - 0.4, -0.7)
        axis.set_xlabel("share of answers" if chance is None else f"share of answers (chance {chance:.3f})")
        axis.set_title(PANEL_TITLES.get(name, name), pad=14)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    for row, line in enumerate(summaries):
        axes[0][-1].text(1.02, row, _bytes(line.state_bytes), va="center", fontsize=9.5, color=INK)
    axes[0][-1].text(1.02, -0.62, "state", va="bottom", fontsize=9)
    axes[0][0].set_yticks(list(rows), [_shown(line.label) for line in summaries])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=14)
    figure.tight_layout()
    return figure


def _curves(summaries: Sequence[Summary], title: str, score: str) -> Any:
    """The score over the segments in their order, one line per mixer, one panel per kind of key; a band spans the seeds."""
    panels: dict[str, list[str]] = {}
    for name in summaries[0].mean:
        panels.setdefault(name.split()[-1] if name.endswith((" updated", " kept")) else "", []).append(name)
    longest = max(len(names) for names in panels.values())
    size = (2.6 + len(panels) * (1.2 + 0.95 * max(3, longest)), 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    colours = plt.get_cmap("tab10")
    for axis, (kind, names) in zip(axes[0], panels.items(), strict=True):
        at = range(len(names))
        for i, line in enumerate(summaries):
            mean = [line.mean[name] for name in names]
            axis.plot(at, mean, marker="o", ms=5, lw=2, color=colours(i % 10), label=_shown(line.label))
            if line.seeds > 1:
                low = [min(line.every[name]) for name in names]
                high = [max(line.every[name]) for name in names]
                axis.fill_between(at, low, high, color=colours(i % 10), alpha=0.15, lw=0)
        axis.set_xticks(list(at), [name.removesuffix(f" {kind}").replace(" ", "\n") for name in names])
        axis.set_xlim(-0.3, len(names) - 0.7)
        axis.set_ylim(0, 1.03 * max(1.0, *(line.mean[name] for line in summaries for name in names)))
        axis.grid(axis="y", color=GREY, lw=0.7)
        axis.set_title(PANEL_TITLES.get(kind, ""))
    axes[0][0].set_ylabel(score)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=14)
    figure.tight_layout()
    return figure


def draw_untrained(path: Path, results: Sequence[UntrainedResult], d: int) -> None:
    """untrained.png: the three figures over the number of pairs; the dashed line is where n reaches d."""
    panels = (
        ("retrieval", "Every key written once", "nearest value is the right one"),
        ("relative_error", "The same: error of the answer", "relative squared error"),
        ("newest", "Every key written twice", "nearest value is the second one"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 3.9))
        colours = plt.get_cmap("tab10")
        for axis, (field, title, label) in zip(axes, panels, strict=True):
            for i, rule in enumerate(dict.fromkeys(result.rule for result in results)):
                mine = [result for result in results if result.rule == rule]
                values = [getattr(result, field) for result in mine]
                at = [result.pairs for result in mine]
                axis.plot(at, values, marker="o", ms=5, lw=2, color=colours(i % 10), label=_shown(rule))
            axis.axvline(d, color=INK, lw=1, ls=(0, (4, 3)))
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({result.pairs for result in results}))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_title(title)
            axis.set_xlabel("pairs")
            axis.set_ylabel(label)
            axis.grid(axis="y", color=GREY, lw=0.7)
            if field == "relative_error":
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.03)
        axes[0].text(d, 0.03, f"  n = d = {d}", fontsize=9)
        axes[2].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.suptitle(
            "Untrained recall: the inner rules alone, on random unit keys",
            x=0.01,
            ha="left",
            fontweight="bold",
            fontsize=14,
        )
        figure.tight_layout()
        _save(figure, path)


def _bytes(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def _shown(label: str) -> str:
    return label.replace("_", " ")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=180, bbox_inches="tight", facecolor="white")
    plt.close(figure)
