"""The LightningModule around `ttr.LM`: logits only at the queries, accuracy by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

import ttr
from experiments.metrics import SliceMetrics
from experiments.tasks import IGNORE, Batch, Segment


def build_lm(vocab_size: int, model: dict[str, Any], specs: Sequence[Any]) -> ttr.LM:
    """The language model of a run; `model` is a ModelConfig as a mapping (its `layer` is in the specs already)."""
    options = {name: model[name] for name in ("mlp", "mlp_ratio", "tie_embeddings")}
    init_std = model["d_model"] ** -0.5 if model["init_std"] is None else model["init_std"]
    return ttr.LM(vocab_size, model["d_model"], list(specs), init_std=init_std, **options)


class RecallModule(LightningModule):
    """Trains on the cross entropy at the labelled positions.

    Every hyperparameter is a plain container, so that `load_from_checkpoint` rebuilds the module from a file alone.

    Args:
        vocab_size: of the task.
        model: a ModelConfig as a mapping.
        declarations: one declaration per block.
        train: a TrainConfig as a mapping; its `lr` is the run's.
        steps: length of the schedule.
        segments: of the val and test splits, for the names of the slices.
    """

    def __init__(
        self,
        vocab_size: int,
        model: dict[str, Any],
        declarations: list[dict[str, Any]],
        train: dict[str, Any],
        steps: int,
        segments: Sequence[Segment] = (),
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["segments", "compile"])
        self.lm = build_lm(vocab_size, model, [ttr.declare(declaration) for declaration in declarations])
        self.train_settings, self.steps = train, steps
        # The inner function is compiled, never the LightningModule; unbound from the module tree, so that the
        # checkpoint of a compiled run loads into one that is not.
        self._hidden = torch.compile(self.lm.hidden) if compile else self.lm.hidden
        self.metrics = SliceMetrics(segments)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits [n, V], labels [n]) at the labelled positions only: the head is most of the cost elsewhere."""
        at = batch.labels != IGNORE
        return self.lm.head(self._hidden(batch.tokens)[at]).float(), batch.labels[at]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, labels = self.logits(batch)
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss, batch_size=len(batch.tokens))
        return loss

    def _evaluate(self, batch: Batch) -> None:
        logits, labels = self.logits(batch)
        self.metrics.update(batch, logits.argmax(dim=-1), F.cross_entropy(logits, labels, reduction="none"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.report("val"))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.metrics.report("test"))

    def configure_optimizers(self) -> dict[str, Any]:
        settings, undecayed = self.train_settings, no_decay_names(self.lm)
        named = dict(self.lm.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if n not in undecayed], "weight_decay": settings["weight_decay"]},
            {"params": [p for n, p in named.items() if n in undecayed], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]))
        scale = LrScale(self.steps, settings["warmup"], settings["schedule"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def no_decay_names(lm: ttr.LM) -> set[str]:
    """The parameters that weight decay must leave alone, as the model says."""
    names = set(lm.no_weight_decay())
    unknown = names - {name for name, _ in lm.named_parameters()}
    if unknown:
        raise ValueError(f"no_weight_decay() names parameters the model does not have: {sorted(unknown)}")
    return names


class LrScale:
    """Factor on the learning rate at a step: linear warmup, then constant or a half cosine to zero."""

    def __init__(self, steps: int, warmup: float, schedule: str):
        self.steps, self.schedule = steps, schedule
        self.warmup_steps = math.ceil(warmup * steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_count(lm: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)


@torch.no_grad()
def state_bytes(lm: ttr.LM, vocab_size: int, seq_len: int) -> int:
    """Bytes that decoding carries for one sequence after `seq_len` tokens, read off the real state object.

    The state is measured after a prefill and not when empty, because a softmax cache grows with the sequence.
    """
    tokens = torch.randint(vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    _, state = lm.prefill(tokens.to(next(lm.parameters()).device))
    return state.nbytes
