"""The generator behind every recall task: pairs are written, some keys are written again, each key is asked once.

    k1 v1 k2 v2 ... kn vn | k3 v3' k1 v1' ...   | . . k2 . . . k1 . k3 . ...
    n pairs, `passes` times | `updates` rewrites | queries; every other token is filler

The label of a query is the last value its key was given. It stands at the query's own position, every other label is
`IGNORE`, and the value is never fed back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Batch(NamedTuple):
    """Tokens and answers of `rows` examples; `segment` says which part of the split they come from."""

    tokens: Tensor  # [rows, T] int64
    labels: Tensor  # [rows, T] int64: the answer at each query, IGNORE elsewhere
    stale: Tensor  # [rows, T] int64: the value a rewritten key had before, at its query; IGNORE elsewhere
    segment: int


def distinct(rows: int, choices: int, n: int, generator: torch.Generator) -> Tensor:
    """[rows, n]: n distinct numbers below `choices` in random order, uniformly, independently for each row."""
    return torch.rand(rows, choices, generator=generator).topk(n, dim=1).indices


def power_law_slots(rows: int, slots: int, n: int, power: float, generator: torch.Generator) -> Tensor:
    """[rows, n]: n distinct slots drawn one after the other with p(s) proportional to (s + 1)^(power - 1).

    Gumbel-top-k: the n largest of log p(s) + Gumbel noise, in falling order, follow exactly the law of n sequential
    draws without replacement. `power` 1 is uniform.
    """
    log_p = (power - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
    noise = -torch.empty(rows, slots, dtype=torch.float64).exponential_(generator=generator).log()
    return (log_p + noise).topk(n, dim=1).indices


def recall_examples(
    rows: int,
    generator: torch.Generator,
    *,
    vocab_size: int,
    seq_len: int,
    pairs: int,
    updates: int = 0,
    passes: int = 1,
    power: float = 0.01,
    fill: bool = True,
    segment: int = 0,
) -> Batch:
    """Draw `rows` examples of the layout above.

    Keys are distinct and come from 1 .. V/2 - 1 (0 is the filler), first values are distinct and come from V/2 .. V - 1.
    A random subset of `updates` keys, in random order, is written again with a value different from its first one.
    Queries stand at every second position after the pairs: the i-th key takes the i-th drawn slot (`power_law_slots`).
    `fill` replaces every filler by a uniform token of the whole vocabulary, which may collide with a key or a value:
    that is how the task was published.
    """
    check_sizes(vocab_size=vocab_size, seq_len=seq_len, pairs=pairs, updates=updates, passes=passes)
    first_value, context = vocab_size // 2, 2 * (pairs * passes + updates)
    n_values = vocab_size - first_value
    keys = 1 + distinct(rows, first_value - 1, pairs, generator)
    values = first_value + distinct(rows, n_values, pairs, generator)

    rewritten = distinct(rows, pairs, updates, generator)
    old = values.gather(1, rewritten)
    # A cyclic shift by 1 .. n_values - 1 is uniform over all the other values and can never return the old one.
    shift = torch.randint(1, n_values, old.shape, generator=generator)
    new = first_value + (old - first_value + shift) % n_values
    answers = values.scatter(1, rewritten, new)
    old_answers = torch.full_like(values, IGNORE).scatter(1, rewritten, old)

    tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
    tokens[:, 0:context:2] = torch.cat([keys.repeat(1, passes), keys.gather(1, rewritten)], dim=1)
    tokens[:, 1:context:2] = torch.cat([values.repeat(1, passes), new], dim=1)
    queries = context + 2 * power_law_slots(rows, (seq_len - context) // 2, pairs, power, generator)
    tokens.scatter_(1, queries, keys)
    labels = torch.full_like(tokens, IGNORE).scatter(1, queries, answers)
    stale = torch.full_like(tokens, IGNORE).scatter(1, queries, old_answers)
    if fill:
        tokens = torch.where(tokens == 0, torch.randint(vocab_size, tokens.shape, generator=generator), tokens)
    return Batch(tokens, labels, stale, segment)


def check_sizes(*, vocab_size: int, seq_len: int, pairs: int, updates: int, passes: int) -> None:
    """Raise ValueError where the sizes leave no room for the task."""
    for name, value, least in (("pairs", pairs, 1), ("updates", updates, 0), ("passes", passes, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if seq_len % 2:
        raise ValueError(f"seq_len must be even, got {seq_len}")
    if updates > pairs:
        raise ValueError(f"updates must be at most pairs ({pairs}), got {updates}: each key is rewritten once at most")
    if pairs > vocab_size // 2 - 1:
        raise ValueError(f"vocab_size {vocab_size} has {vocab_size // 2 - 1} keys, {pairs} pairs were asked for")
    needed = 2 * (pairs * passes + updates) + 2 * pairs
    if needed > seq_len:
        raise ValueError(
            f"seq_len {seq_len} is too short: {pairs} pairs x {passes} passes + {updates} updates + {pairs} queries need {needed} tokens"
        )
