"""One run: one mixer, one seed, one learning rate. Interrupted at any point, it goes on and ends the same.

FOLDER/runs/RUN/config.yaml     what was asked
                checkpoints/    the newest checkpoint, while the run is under way
                metrics.csv     losses and accuracies by step
                final.ckpt      the trained model (`load_from_checkpoint` of the task's module)
                result.json     the outcome; a run that has it is finished
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import platform
import signal
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

import ttr
from experiments.callbacks import Clock, Progress, Report
from experiments.config import ExecutionConfig, read_task
from experiments.model import build_module, parameter_count, state_bytes
from experiments.tasks import TaskData, slice_names


@dataclass(frozen=True)
class Run:
    """Everything that decides a result, as plain containers."""

    label: str
    declaration: list[dict[str, Any]]  # one per block
    seed: int
    lr: float
    task: dict[str, Any]
    model: dict[str, Any]
    train: dict[str, Any]

    @property
    def id(self) -> str:
        """Hash of the resolved configuration. Equivalent declarations, whatever their label, are the same run."""
        model = {key: value for key, value in self.model.items() if key != "layer"}  # merged into the declarations
        resolved = {**asdict(self), "model": model, "train": self.train | {"lr": self.lr}}
        resolved |= {"label": None, "declaration": [ttr.declare(declaration).hash for declaration in self.declaration]}
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        return f"{self.label} · seed {self.seed} · lr {self.lr:g}"

    def folder(self, experiment_folder: Path) -> Path:
        return experiment_folder / "runs" / self.id


def read_result(run: Run, experiment_folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; None where there is none."""
    path = run.folder(experiment_folder) / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def train(run: Run, experiment_folder: Path, execution: ExecutionConfig, report: Report | None = None) -> dict[str, Any]:
    """Train, evaluate and write the result; goes on from the newest checkpoint, returns the result of a finished run."""
    finished = read_result(run, experiment_folder)
    if finished is not None:
        return finished
    _quieten()
    folder = run.folder(experiment_folder)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(run)), folder / "config.yaml")
    started = time.perf_counter()

    task = read_task(run.task)
    settings: dict[str, Any] = run.train | {"lr": run.lr}
    data = TaskData(
        task,
        seed=run.seed,
        steps=total_steps(run),
        batch_size=settings["batch_size"],
        test_batch_size=settings["test_batch_size"],
        workers=execution.workers,
    )
    lightning.seed_everything(run.seed, workers=True, verbose=False)
    segments = task.segments("test")
    module = build_module(task, run.model, run.declaration, settings, data.steps, segments, compile=execution.compile)
    score = task.interface.score
    clock = Clock()
    callbacks: list[Callback] = [clock, Progress(run.name, data.steps, score.name, report)] if report else [clock]
    if settings["stop_at"] is not None:
        callbacks.append(
            EarlyStopping(f"val/{score.name}", mode=score.best, patience=data.steps, stopping_threshold=settings["stop_at"], verbose=False)
        )
    checkpoints = folder / "checkpoints"
    callbacks.append(
        ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=execution.checkpoint_every, enable_version_counter=False)
    )
    trainer = Trainer(
        accelerator=execution.device if execution.device != "cuda" else "gpu",
        devices=1,
        max_epochs=1,  # of the step loader: it holds all the steps of the run
        precision=settings["precision"],
        gradient_clip_val=settings["clip"],
        val_check_interval=settings["eval_every"] or data.steps + 1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, data.steps),
        logger=_loggers(folder, execution),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    newest = max(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=newest)
        val = trainer.validate(module, datamodule=data, verbose=False)[0]
        test = trainer.test(module, datamodule=data, verbose=False)[0]
    except SystemExit as stop:  # how Lightning ends after Ctrl-C, which it has made the process deaf to
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from stop

    longest = max(segment.seq_len for segment in segments)
    result = {
        "id": run.id,
        "label": run.label,
        "seed": run.seed,
        "lr": run.lr,
        "parameters": parameter_count(module.lm),
        "state_bytes": state_bytes(module.lm, task.interface, longest),
        "steps": trainer.global_step,
        "tokens_per_second": clock.tokens_per_second(),
        "seconds": clock.earlier_seconds + time.perf_counter() - started,
        "score": score.name,
        "val": _by_slice(val, "val", score.name, slice_names(segments)),
        "test": _by_slice(test, "test", score.name, slice_names(segments)),
        "environment": environment(str(trainer.strategy.root_device)),
    }
    trainer.save_checkpoint(folder / "final.ckpt", weights_only=True)
    _merge_logs(folder)
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    temporary.rename(folder / "result.json")  # the file appears whole or not at all
    for checkpoint in checkpoints.glob("*.ckpt"):
        checkpoint.unlink()
    return result


def total_steps(run: Run) -> int:
    """Length of a run in optimizer steps."""
    if run.train["steps"] is not None:
        return run.train["steps"]
    steps = TaskData(read_task(run.task), seed=run.seed, steps=1, batch_size=run.train["batch_size"]).split("train").steps_per_epoch()
    if steps is None:
        raise ValueError("train.epochs needs a task with a number of training examples; this one is endless: give steps")
    return steps * run.train["epochs"]


def environment(device: str) -> dict[str, Any]:
    """Where a result comes from."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _by_slice(metrics: Any, stage: str, score: str, names: list[str]) -> dict[str, Any]:
    """{SCORE, "loss", "slices": {name: {SCORE, "old"}}}; `old` is the fraction of outdated answers, where there is one."""
    slices = {name: {score: metrics[f"{stage}/{score}/{name}"], "old": metrics.get(f"{stage}/old/{name}")} for name in names}
    return {score: metrics[f"{stage}/{score}"], "loss": metrics[f"{stage}/loss"], "slices": slices}


def _loggers(folder: Path, execution: ExecutionConfig) -> list[Any]:
    # A CSVLogger empties the folder it is given, so every attempt at a run writes its own; _merge_logs joins them.
    attempt = len(list((folder / "log").glob("*"))) if (folder / "log").is_dir() else 0
    loggers: list[Any] = [CSVLogger(folder, name="log", version=str(attempt), flush_logs_every_n_steps=10)]
    if execution.tensorboard:
        try:
            loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "execution.tensorboard=true needs tensorboard (pip install tensorboard); the CSV log is always written"
            ) from error
    return loggers


def _merge_logs(folder: Path) -> None:
    """Join the logs of all attempts; where two cover a step the later one counts."""
    rows: dict[tuple[int, bool], dict[str, str]] = {}
    for path in sorted((folder / "log").glob("*/metrics.csv"), key=lambda path: int(path.parent.name)):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                filled = {key: value for key, value in row.items() if value not in ("", None)}
                rows.setdefault((int(row["step"]), "train/loss" in filled), {}).update(filled)
    ordered = [rows[key] for key in sorted(rows)]
    columns = sorted({key for row in ordered for key in row}, key=lambda key: (key != "step", key))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(ordered)


def _quieten() -> None:
    """Drop what Lightning says about choices that are made on purpose here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.* is deprecated.*",
        "Checkpoint directory .* exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)
