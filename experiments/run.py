"""python -m experiments.run CONFIG [key=value ...]

Trains every mixer of a configuration under every seed, skips what is finished, goes on with what was interrupted, and
ends with a table and a picture. `mixer=` makes it one mixer: a label of the configuration, a preset, a YAML path or a
mapping; `mixer.optimizer=momentum` changes its declaration.

    python -m experiments.run recall
    python -m experiments.run recall mixer=gated_deltanet seeds=[0,1,2]
    python -m experiments.run mqar mixers=[deltanet,kda] lrs=[1e-3,3e-3] execution.jobs=4
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from experiments import config as configuration
from experiments import report
from experiments.compare import execute, plan, sizes, summarise, write_csv
from experiments.config import ConfigError, Experiment
from experiments.progress import RunBars
from experiments.tasks.untrained import untrained_recall
from experiments.train import read_result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a name from --list, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.lr=1e-3 seeds=[0,1,2]")
    parser.add_argument("--list", action="store_true", help="name the configurations and stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="print runs, parameters and state bytes and stop")
    options = parser.parse_intermixed_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file wraps nothing
    if options.list:
        for name in configuration.names():
            console.print(f"[bold]{name}[/bold]: {configuration.load(name).config.title}", highlight=False)
        return 0
    if options.config is None:
        parser.error("say which CONFIG; --list names them")
    try:
        experiment = configuration.load(options.config, options.overrides)
        if options.print_config:
            print(OmegaConf.to_yaml(OmegaConf.create(experiment.to_dict())), end="")
            return 0
        if options.dry_run:
            runs = plan(experiment)
            finished = sum(read_result(run, experiment.folder) is not None for run in runs)
            console.print(report.size_table(sizes(experiment), len(runs), finished))
            return 0
        return run(experiment, console)
    except ConfigError as error:
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command goes on from the last checkpoints.")
        return 130


def run(experiment: Experiment, console: Console) -> int:
    """The whole experiment; the number of failed runs decides the exit status."""
    started, config, interface = time.perf_counter(), experiment.config, experiment.task.interface
    torch.set_num_threads(config.execution.threads)
    runs = plan(experiment)
    sizes(experiment)  # refuses a wrong declaration before the first step
    console.print(f"[bold]{config.title or config.name}[/bold]", highlight=False)
    if config.untrained is not None:
        show_untrained(experiment, console)
    with RunBars(console) as bars:
        failures = execute(experiment, runs, bars)
    summaries = summarise(experiment, runs)
    write_csv(experiment.folder / "results.csv", experiment, runs)
    if summaries:
        picture = experiment.folder / f"{interface.score.name}.png"
        report.draw(picture, summaries, config.title or config.name, interface.score.name, chance=interface.chance)
        console.print()
        console.print(report.result_table(summaries, config.title or config.name, interface.score.name))
    if config.notes:
        console.print(Padding(config.notes.strip(), (0, 1)), highlight=False, width=min(console.width, 110))
    pictures = f"{interface.score.name}.png" + (", untrained.png" if config.untrained is not None else "")
    console.print(f"\n{experiment.folder}: {pictures}, results.csv, runs/   ({time.perf_counter() - started:.0f} s)")
    for failure in failures:
        console.print(f"[red]failed:[/red] {escape(failure)}", highlight=False)
    return 1 if failures else 0


def show_untrained(experiment: Experiment, console: Console) -> None:
    settings = asdict(experiment.config.untrained)  # type: ignore[arg-type]
    results = untrained_recall(**settings)
    console.print(report.untrained_table(results, settings["d"]))
    report.draw_untrained(experiment.folder / "untrained.png", results, settings["d"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is an interruption too
    sys.exit(main())
