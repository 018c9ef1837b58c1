"""The LightningModules around `ttr.LM`: answers only where they are asked for, scores by slice."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

import ttr
from experiments.metrics import ErrorMetrics, SliceMetrics
from experiments.tasks import IGNORE, Batch, Interface, Segment, Task, Tokens, VectorBatch, Vectors


class VectorLM(ttr.LM):
    """`ttr.LM` between two linear maps: vectors [B, T, inputs] instead of tokens, [B, T, outputs] instead of logits."""

    def __init__(self, inputs: int, outputs: int, d_model: int, layers: Sequence[Any], **options: Any):
        super().__init__(outputs, d_model, layers, tie_embeddings=False, **options)
        self.embedding = torch.nn.Linear(inputs, d_model, bias=False)  # type: ignore[assignment]
        self._reset_linear()

    def _check_tokens(self, tokens: Tensor, shape: str) -> Tensor:
        if not tokens.is_floating_point() or tokens.ndim != shape.count(",") + 2:
            raise ValueError(f"vectors: got {tokens.dtype} of shape {list(tokens.shape)}, expected floats {shape[:-1]}, inputs]")
        return tokens


def build_lm(interface: Interface, model: dict[str, Any], specs: Sequence[Any]) -> ttr.LM:
    """The model of a run; `model` is a ModelConfig as a mapping (its `layer` is in the specs already)."""
    options = {name: model[name] for name in ("mlp", "mlp_ratio")}
    options["init_std"] = model["d_model"] ** -0.5 if model["init_std"] is None else model["init_std"]
    if isinstance(interface, Tokens):
        return ttr.LM(interface.vocab_size, model["d_model"], list(specs), tie_embeddings=model["tie_embeddings"], **options)
    return VectorLM(interface.inputs, interface.outputs, model["d_model"], list(specs), **options)


class TaskModule(LightningModule, ABC):
    """Trains and evaluates a model on one kind of task, whose class says in `loss` and `count` what its answers are worth.

    Every hyperparameter is a plain container, so that `load_from_checkpoint` rebuilds the module from a file alone.

    Args:
        interface: of the task; the final classes take its numbers.
        model: a ModelConfig as a mapping.
        declarations: one declaration per block.
        train: a TrainConfig as a mapping; its `lr` is the run's.
        steps: length of the schedule.
        metrics: of the val and test splits.
    """

    def __init__(
        self,
        interface: Interface,
        model: dict[str, Any],
        declarations: list[dict[str, Any]],
        train: dict[str, Any],
        steps: int,
        metrics: SliceMetrics | ErrorMetrics,
        compile: bool,
    ):
        super().__init__()
        self.lm = build_lm(interface, model, [ttr.declare(declaration) for declaration in declarations])
        self.train_settings, self.steps = train, steps
        # The inner function is compiled, never the LightningModule; unbound from the module tree, so that the
        # checkpoint of a compiled run loads into one that is not.
        self._hidden = torch.compile(self.lm.hidden) if compile else self.lm.hidden
        self.metrics = metrics

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training lowers, a scalar."""

    @abstractmethod
    def count(self, batch: Any) -> None:
        """Enter the answers to a batch in the metrics."""

    def answers(self, inputs: Tensor, at: Tensor) -> Tensor:
        """[n, outputs] where `at` [rows, T] is true, and only there: the head is most of the cost elsewhere."""
        return self.lm.head(self._hidden(inputs)[at]).float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.count(batch)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.report("val"))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.count(batch)

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


class RecallModule(TaskModule):
    """Tokens: the cross entropy at the labelled positions, and accuracy. Arguments as in `TaskModule`."""

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
        super().__init__(Tokens(vocab_size), model, declarations, train, steps, SliceMetrics(segments), compile)
        self.save_hyperparameters(ignore=["segments", "compile"])

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits [n, V], labels [n]) at the labelled positions."""
        at = batch.labels != IGNORE
        return self.answers(batch.tokens, at), batch.labels[at]

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(*self.logits(batch))

    def count(self, batch: Batch) -> None:
        logits, labels = self.logits(batch)
        self.metrics.update(batch, logits.argmax(dim=-1), F.cross_entropy(logits, labels, reduction="none"))  # type: ignore[call-arg]


class RegressionModule(TaskModule):
    """Vectors: the mean squared error at the questions, and the error relative to answering zero. Arguments as in `TaskModule`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        model: dict[str, Any],
        declarations: list[dict[str, Any]],
        train: dict[str, Any],
        steps: int,
        segments: Sequence[Segment] = (),
        compile: bool = False,
    ):
        super().__init__(Vectors(inputs, outputs), model, declarations, train, steps, ErrorMetrics(segments), compile)
        self.save_hyperparameters(ignore=["segments", "compile"])

    def loss(self, batch: VectorBatch) -> Tensor:
        return F.mse_loss(self.answers(batch.inputs, batch.asked), batch.targets[batch.asked])

    def count(self, batch: VectorBatch) -> None:
        self.metrics.update(batch, self.answers(batch.inputs, batch.asked))  # type: ignore[call-arg]


def build_module(task: Task, *arguments: Any, **options: Any) -> TaskModule:
    """The module of a task, from the arguments of `TaskModule` that follow the interface."""
    interface = task.interface
    if isinstance(interface, Tokens):
        return RecallModule(interface.vocab_size, *arguments, **options)
    return RegressionModule(interface.inputs, interface.outputs, *arguments, **options)


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
def state_bytes(lm: ttr.LM, interface: Interface, seq_len: int) -> int:
    """Bytes that decoding carries for one sequence after `seq_len` tokens, read off the real state object.

    The state is measured after a prefill and not when empty, because a softmax cache grows with the sequence.
    """
    inputs = interface.example(seq_len, torch.Generator().manual_seed(0))
    _, state = lm.prefill(inputs.to(next(lm.parameters()).device))
    return state.nbytes
