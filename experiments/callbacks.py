"""What watches a run: the clock behind tokens per second, and the news for the progress bars."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

Report = Callable[[dict[str, Any]], None]  # takes {"run", "step", "steps", "score": ("loss" or the task's, its value)}
WARMUP_STEPS = 3  # steps that the clock ignores: allocation, compilation


class Clock(Callback):
    """Seconds spent training (validation excluded), across interruptions."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self.earlier_seconds = 0.0, 0, 0.0
        self._since: float | None = None
        self._seen = 0
        self._created = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        self._seen += 1
        if self._seen > WARMUP_STEPS:
            self.tokens += batch[0].shape[0] * batch[0].shape[1]
        elif self._seen == WARMUP_STEPS:
            self._start(module)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking and self._seen >= WARMUP_STEPS:
            self._start(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop(module)

    def _start(self, module: LightningModule) -> None:
        self._synchronize(module)
        self._since = time.perf_counter()

    def _stop(self, module: LightningModule) -> None:
        if self._since is not None:
            self._synchronize(module)
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @staticmethod
    def _synchronize(module: LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)

    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        open_seconds = now - self._since if self._since is not None else 0.0
        elapsed = self.earlier_seconds + now - self._created
        return {"seconds": self.seconds + open_seconds, "tokens": self.tokens, "elapsed": elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]
        self.earlier_seconds = state_dict["elapsed"]


class Progress(Callback):
    """Tells `report` where a run stands, every few steps and after every look at the val split."""

    def __init__(self, run: str, steps: int, score: str, report: Report):
        self.run, self.steps, self.score, self.report = run, steps, score, report
        self.every = max(1, steps // 100)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step % self.every == 0:
            loss = float(outputs["loss"])
            self.report({"run": self.run, "step": trainer.global_step, "steps": self.steps, "score": ("loss", loss)})

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        value = trainer.callback_metrics.get(f"val/{self.score}")
        if value is not None:
            step = trainer.global_step
            self.report({"run": self.run, "step": step, "steps": self.steps, "score": (self.score, float(value))})
