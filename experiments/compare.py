"""Many runs: every mixer under every seed and learning rate; finished ones are skipped, several go at a time."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import signal
import statistics
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from experiments.callbacks import Report
from experiments.config import ConfigError, ExecutionConfig, Experiment
from experiments.model import build_lm, parameter_count, state_bytes
from experiments.progress import RunBars
from experiments.tasks import slice_names
from experiments.train import Run, read_result, train


@dataclass(frozen=True)
class Size:
    """What a mixer costs, before anything is trained."""

    label: str
    parameters: int
    state_bytes: int


@dataclass(frozen=True)
class Summary:
    """A mixer at its best learning rate (chosen on the val split), over the seeds (measured on the test split)."""

    label: str
    lr: float
    seeds: int
    parameters: int
    state_bytes: int
    tokens_per_second: float
    mean: dict[str, float]  # the task's score (accuracy or error) by slice
    sd: dict[str, float]  # over the seeds; nan for one seed
    old: dict[str, float]  # fraction of outdated answers, by slice that has rewritten keys
    every: dict[str, list[float]]  # the score by slice and seed


def plan(experiment: Experiment) -> list[Run]:
    """All the runs; those of one mixer stand together, since equally long ones share the cores best."""
    config = experiment.config
    shared = {"task": config.task, "model": asdict(config.model), "train": asdict(config.train)}
    return [
        Run(mixer.label, mixer.per_block(config.model.n_layers), seed, lr, **shared)
        for mixer in experiment.mixers
        for lr in experiment.lrs
        for seed in config.seeds
    ]


def sizes(experiment: Experiment) -> list[Size]:
    """Parameters and state bytes of every mixer, from a model built and run once; checks each declaration by that."""
    task, config = experiment.task, experiment.config
    longest = max(segment.seq_len for segment in task.segments("test"))
    result = []
    for mixer in experiment.mixers:
        try:
            lm = build_lm(task.interface, asdict(config.model), mixer.per_block(config.model.n_layers))
            result.append(Size(mixer.label, parameter_count(lm), state_bytes(lm, task.interface, longest)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"mixer {mixer.label!r}: {error}") from error
    return result


def execute(experiment: Experiment, runs: Sequence[Run], bars: RunBars) -> list[str]:
    """Run what is not finished yet; returns a message for every run that failed. The others go on."""
    folder, execution = experiment.folder, experiment.config.execution
    open_runs = {run.id: run for run in runs if read_result(run, folder) is None}
    total = len({run.id for run in runs})
    bars.start(total=total, finished=total - len(open_runs))
    device = resolve_device(execution.device)
    jobs = parallel_jobs(execution, device, len(open_runs))
    execution = dataclasses.replace(execution, device=device)
    if not open_runs:
        return []
    if jobs == 1:
        return list(_in_process(open_runs.values(), folder, execution, bars))
    return list(_in_pool(open_runs.values(), folder, execution, jobs, bars))


def resolve_device(wanted: str) -> str:
    """ "cpu" or "cuda"."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("execution.device=cuda, but torch finds no CUDA device; choose cpu or auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def parallel_jobs(execution: ExecutionConfig, device: str, runs: int) -> int:
    """Runs at a time: as many as there are cores on the CPU, one on a GPU, unless the configuration says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(execution.jobs or (cores if device == "cpu" else 1), runs))


def _in_process(runs: Iterable[Run], folder: Path, execution: ExecutionConfig, bars: RunBars) -> Iterable[str]:
    torch.set_num_threads(execution.threads)
    for run in runs:
        try:
            bars.finish(run.name, train(run, folder, execution, bars.update))
        except Exception as error:
            bars.fail(run.name)
            yield _failure(run, error)


def _in_pool(runs: Iterable[Run], folder: Path, execution: ExecutionConfig, jobs: int, bars: RunBars) -> Iterable[str]:
    context = multiprocessing.get_context("spawn")  # fork is unsafe once torch has started threads
    queue, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(jobs, context, _start_worker, (queue, stop, execution.threads)) as pool:
        waiting = {pool.submit(_work, run, folder, execution): run for run in runs}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(queue, bars)
                for future in done:
                    run = waiting.pop(future)
                    error = future.exception()
                    if error is None:
                        bars.finish(run.name, future.result())
                    else:
                        bars.fail(run.name)
                        yield _failure(run, error)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_report: Report | None = None  # of a worker process: set once when it starts


def _start_worker(queue: Any, stop: Any, threads: int) -> None:
    """Ctrl-C reaches every process of a terminal; the parent alone answers it, and tells the workers to stop."""
    global _report
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = os.getppid()

    def report(event: dict[str, Any]) -> None:
        if stop.is_set() or os.getppid() != parent:
            raise KeyboardInterrupt
        queue.put(event)

    _report = report


def _work(run: Run, folder: Path, execution: ExecutionConfig) -> dict[str, Any]:
    return train(run, folder, execution, _report)


def _drain(queue: Any, bars: RunBars) -> None:
    while True:
        try:
            bars.update(queue.get_nowait())
        except Empty:
            return


def _failure(run: Run, error: BaseException) -> str:
    return f"{run.name}: {''.join(traceback.format_exception(error)).strip()}"


def summarise(experiment: Experiment, runs: Sequence[Run]) -> list[Summary]:
    """One line per mixer that has a finished run, in the order of the configuration."""
    results = [(run, read_result(run, experiment.folder)) for run in runs]
    names, score = slice_names(experiment.task.segments("test")), experiment.task.interface.score
    best_of = max if score.best == "max" else min
    summaries = []
    for mixer in experiment.mixers:
        mine = [(run, result) for run, result in results if result is not None and run.label == mixer.label]
        if not mine:
            continue
        by_lr: dict[float, list[dict[str, Any]]] = {}
        for run, result in mine:
            by_lr.setdefault(run.lr, []).append(result)
        lr = best_of(by_lr, key=lambda lr: statistics.mean(result["val"][score.name] for result in by_lr[lr]))
        best = by_lr[lr]
        every = {name: [result["test"]["slices"][name][score.name] for result in best] for name in names}
        old = {name: [result["test"]["slices"][name]["old"] for result in best] for name in names}
        summaries.append(
            Summary(
                label=mixer.label,
                lr=lr,
                seeds=len(best),
                parameters=best[0]["parameters"],
                state_bytes=best[0]["state_bytes"],
                tokens_per_second=statistics.median(result["tokens_per_second"] for result in best),
                mean={name: statistics.mean(values) for name, values in every.items()},
                sd={name: statistics.stdev(v) if len(v) > 1 else float("nan") for name, v in every.items()},
                old={name: statistics.mean(values) for name, values in old.items() if None not in values},
                every=every,
            )
        )
    return summaries


def write_csv(path: Path, experiment: Experiment, runs: Sequence[Run]) -> None:
    """The tidy table: one row per finished run, split and slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    score = experiment.task.interface.score.name
    columns = ["mixer", "seed", "lr", "split", "slice", score, "old_answers", "parameters", "state_bytes"]
    columns += ["tokens_per_second", "seconds", "steps", "device", "run"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for run in runs:
            result = read_result(run, experiment.folder)
            if result is None:
                continue
            shared = {key: result[key] for key in columns[7:12]}
            shared |= {"mixer": run.label, "seed": run.seed, "lr": run.lr, "run": run.id}
            shared |= {"device": result["environment"]["device"]}
            for split in ("val", "test"):
                whole = {"all slices": {score: result[split][score], "old": None}}
                for name, values in (whole | result[split]["slices"]).items():
                    row = {"split": split, "slice": name, score: values[score], "old_answers": values["old"]}
                    writer.writerow(shared | row)
