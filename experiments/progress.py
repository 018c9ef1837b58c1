"""One bar per run under way and one for all of them; plain lines where the output is not a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RunBars:
    """Shows what `experiments.train` reports. Use as a context manager; `show=False` prints nothing."""

    def __init__(self, console: Console, show: bool = True):
        self.console, self.show = console, show
        self._bars: dict[str, TaskID] = {}
        self._all: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not (show and console.is_terminal),
        )

    def __enter__(self) -> RunBars:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def start(self, total: int, finished: int) -> None:
        self._all = self._progress.add_task("[bold]runs", total=total, completed=finished, note="")
        if self.show and finished:
            self.console.print(f"{finished} of {total} runs are finished already")

    def update(self, event: dict[str, Any]) -> None:
        """An event of `callbacks.Progress`: step, steps and the newest loss or score of a run."""
        name = event["run"]
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(escape(name), total=event["steps"], note="")
        note = "{} {:.3f}".format(*event["score"])
        self._progress.update(self._bars[name], completed=event["step"], note=note)

    def finish(self, name: str, result: dict[str, Any]) -> None:
        self._close(name)
        if self.show:
            score = result["score"]
            slices = {name: values[score] for name, values in result["test"]["slices"].items()}
            if len(slices) > 2:
                slices = {score: result["test"][score]}
            parts = [f"{name} {value:.3f}" for name, value in slices.items()]
            self.console.print(f"  {escape(name)}: {', '.join(parts)}  [dim]({result['seconds']:.0f} s)[/dim]", highlight=False)

    def fail(self, name: str) -> None:
        self._close(name)
        self.console.print(f"  {escape(name)}: [red]failed[/red]", highlight=False)

    def _close(self, name: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        if self._all is not None:
            self._progress.advance(self._all)
