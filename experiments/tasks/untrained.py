"""Untrained recall: no learning of weights at all, only the inner rules at work on random data.

A memory is written n pairs of random unit keys and values, each rule by `ttr.regress` as declared, and is then asked
for stored keys. Three figures are kept apart because they rank the rules differently:

    retrieval        how often the answer is closest to the right value among the n stored ones
    relative error   |answer - value|^2 / |value|^2, in the mean
    newest           every key is written a second time, with another value: how often the answer is closest to the
                     second one among all 2n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ttr
from experiments.tasks.base import derive_seed

WRITE_SIGNALS = ("step", "weight")  # zero: the token writes nothing


@dataclass(frozen=True)
class UntrainedResult:
    rule: str
    pairs: int
    retrieval: float
    relative_error: float
    newest: float


def unit_vectors(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@torch.no_grad()
def recall_of_rule(spec: ttr.Spec, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """Answers [B, M, d] of a memory that was written `keys`, `values` [B, n, d] in order and is asked `asked` [B, M].

    Every question goes to a copy of the same state: asking must not write. A linear memory is kept from writing by
    a zero step. Softmax has no step: its question carries the key -q, whose weight beside exp(|q|^2 scale) is nil.
    """
    batch, _, d = keys.shape
    params = spec.init_params(1, d, d, dtype=keys.dtype)
    _, state = ttr.regress(keys[:, :, None], keys[:, :, None], values[:, :, None], spec, params=params)
    rows = torch.arange(batch).repeat_interleave(asked.shape[1])
    q = keys[rows, asked.flatten()].view(-1, 1, 1, d)
    nothing: dict[str, Any] = {name: torch.zeros(len(rows), 1, 1, dtype=q.dtype) for name in WRITE_SIGNALS if name in spec.signals()}
    if "log_decay" in spec.signals():
        nothing["log_decay"] = torch.zeros(len(rows), 1, 1, dtype=q.dtype)
    copies = state.index_select(rows)
    answers, _ = ttr.regress(q, -q, torch.zeros_like(q), spec, params=params, initial_state=copies, **nothing)
    return answers.view(batch, -1, d)


def untrained_recall(rules: dict[str, Any], *, d: int, pairs: list[int], sequences: int, queries: int, seed: int) -> list[UntrainedResult]:
    """Every rule at every number of pairs, all on the same random data.

    Args:
        rules: label -> declaration (whatever `ttr.spec` takes) in which every signal is a number.
        d: size of keys and values.
        pairs: numbers of pairs n.
        sequences: memories per n.
        queries: stored keys asked of each.
        seed: of the data.
    """
    specs = {label: read_rule(label, declaration) for label, declaration in rules.items()}
    results = []
    for n in pairs:
        generator = torch.Generator().manual_seed(derive_seed(seed, "untrained", n))
        keys = unit_vectors(sequences, n, d, generator=generator)
        values = unit_vectors(sequences, 2 * n, d, generator=generator)
        asked = torch.rand(sequences, n, generator=generator).topk(min(queries, n), dim=1).indices
        first, second = values[:, :n], values[:, n:]
        wanted = first.gather(1, asked[:, :, None].expand(-1, -1, d))
        for label, spec in specs.items():
            answers = recall_of_rule(spec, keys, first, asked)
            error = (answers - wanted).square().sum(-1) / wanted.square().sum(-1)
            rewritten = recall_of_rule(spec, keys.repeat(1, 2, 1), values, asked)
            results.append(
                UntrainedResult(
                    rule=label,
                    pairs=n,
                    retrieval=share_nearest(answers, first, asked),
                    relative_error=error.mean().item(),
                    newest=share_nearest(rewritten, torch.cat([second, first], dim=1), asked),
                )
            )
    return results


def read_rule(label: str, declaration: Any) -> ttr.Spec:
    """A declaration that can run without a layer: every signal of it is a number."""
    spec = ttr.spec(declaration)
    open_signals = [name for name, signal in spec.signals().items() if not signal.constant]
    if open_signals:
        raise ValueError(f"untrained.rules.{label}: {open_signals} must be numbers, e.g. {open_signals[0]}: 1.0")
    return spec


def share_nearest(answers: Tensor, candidates: Tensor, right: Tensor) -> float:
    """How often the unit vector most along answers [B, M, d] among candidates [B, N, d] is number `right` [B, M]."""
    return ((answers @ candidates.transpose(1, 2)).argmax(dim=-1) == right).double().mean().item()
