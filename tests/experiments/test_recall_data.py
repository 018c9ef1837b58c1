"""The generated examples mean what their labels say, follow the published law, and are a function of their seed."""

import numpy as np
import pytest
import torch

from experiments.tasks import (
    IGNORE,
    MQAR,
    ForgettingMQAR,
    ForgettingSegment,
    MQARSegment,
    Overwrite,
    Split,
    TaskData,
    recall_examples,
    slice_names,
)
from experiments.tasks.recall import power_law_slots


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SIZES = [
    dict(vocab_size=64, seq_len=64, pairs=4),
    dict(vocab_size=64, seq_len=32, pairs=8),  # every slot is a query
    dict(vocab_size=64, seq_len=64, pairs=5, passes=3),
    dict(vocab_size=64, seq_len=64, pairs=6, updates=6, power=1.0),
    dict(vocab_size=64, seq_len=64, pairs=6, updates=3),
]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_labels_are_the_last_value_of_the_key(sizes, fill):
    batch = recall_examples(200, generator(), fill=fill, **sizes)
    context = 2 * (sizes["pairs"] * sizes.get("passes", 1) + sizes.get("updates", 0))
    half = sizes["vocab_size"] // 2
    for tokens, labels, stale in zip(*(t.tolist() for t in batch[:3]), strict=True):
        written: dict[int, list[int]] = {}
        for key, value in zip(tokens[0:context:2], tokens[1:context:2], strict=True):
            assert 0 < key < half <= value < sizes["vocab_size"]
            if value not in written.setdefault(key, []):
                written[key].append(value)
        assert len(written) == sizes["pairs"]
        assert sum(len(values) == 2 for values in written.values()) == sizes.get("updates", 0)
        assert len({values[0] for values in written.values()}) == sizes["pairs"]  # first values do not repeat
        asked = [t for t, label in enumerate(labels) if label != IGNORE]
        assert sorted(tokens[t] for t in asked) == sorted(written)  # each key once, at the label's own position
        assert all(t >= context and (t - context) % 2 == 0 for t in asked)
        for t in asked:
            values = written[tokens[t]]
            assert labels[t] == values[-1]
            assert stale[t] == (values[0] if len(values) == 2 else IGNORE)
        assert all(value == IGNORE for t, value in enumerate(stale) if t not in asked)
        if not fill:
            assert all(tokens[t] == 0 for t in range(context, len(tokens)) if t not in asked)


def test_fill_is_uniform_over_the_whole_vocabulary():
    batch = recall_examples(2000, generator(), vocab_size=16, seq_len=64, pairs=2)
    filler = batch.tokens[:, 4:][batch.labels[:, 4:] == IGNORE]
    share = torch.bincount(filler, minlength=16).double() / len(filler)
    assert (share - 1 / 16).abs().max() < 0.005


def test_an_update_is_uniform_over_the_other_values():
    batch = recall_examples(20_000, generator(), vocab_size=16, seq_len=8, pairs=1, updates=1, fill=False)
    shift = (batch.tokens[:, 3] - batch.tokens[:, 1]) % 8
    share = torch.bincount(shift, minlength=8).double() / len(shift)
    assert share[0] == 0
    assert (share[1:] - 1 / 7).abs().max() < 0.012


def published_slots(rows, slots, n, power, seed):
    """numpy's sequential draw without replacement, as the published generator makes it."""
    rng = np.random.default_rng(seed)
    p = np.arange(1, slots + 1) ** (power - 1.0)
    return np.stack([rng.choice(slots, size=n, replace=False, p=p / p.sum()) for _ in range(rows)])


@pytest.mark.parametrize(("slots", "n", "power"), [(28, 4, 0.01), (8, 8, 0.01), (12, 3, 1.0)])
def test_slots_follow_the_published_law(slots, n, power):
    ours = power_law_slots(20_000, slots, n, power, generator()).numpy()
    theirs = published_slots(20_000, slots, n, power, seed=1)
    assert all(len(set(row)) == n for row in ours.tolist())
    for i in range(n):  # of the i-th key: the order of the draw matters
        gap = np.bincount(ours[:, i], minlength=slots) - np.bincount(theirs[:, i], minlength=slots)
        assert np.abs(gap).max() / 20_000 < 0.018  # five standard deviations of a difference of frequencies
    p = np.arange(1, slots + 1) ** (power - 1.0)
    first = np.bincount(ours[:, 0], minlength=slots) / 20_000
    assert np.abs(first - p / p.sum()).max() < 0.018


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(vocab_size=64, seq_len=31, pairs=2), "seq_len must be even, got 31"),
        (dict(vocab_size=64, seq_len=30, pairs=8), "need 32 tokens"),
        (dict(vocab_size=16, seq_len=64, pairs=8), "7 keys, 8 pairs"),
        (dict(vocab_size=64, seq_len=64, pairs=4, updates=5), "updates must be at most pairs"),
        (dict(vocab_size=64, seq_len=64, pairs=0), "pairs must be at least 1"),
    ],
)
def test_sizes_without_room_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        recall_examples(2, generator(), **sizes)


def all_rows(split):
    batches = [split[step] for step in range(split.steps_per_epoch())]
    return torch.cat([batch.tokens for batch in batches])


def test_batches_are_a_function_of_seed_split_and_step():
    task = Overwrite(vocab_size=32, seq_len=16, pairs=2, updates=2, examples=3000)

    def split(name="train", seed=0, batch_size=64):
        return Split(task.segments("train"), split=name, seed=seed, batch_size=batch_size)

    assert torch.equal(split()[30].tokens, split()[30].tokens)  # no batch needs the ones before it
    assert torch.equal(all_rows(split()), all_rows(split(batch_size=1000)))  # nor does the batch size change an example
    assert len(all_rows(split())) == 3000
    assert torch.equal(split()[0].tokens, split()[split().steps_per_epoch()].tokens)  # the next epoch: the same data
    for other in (split(seed=1), split(name="test")):
        assert not torch.equal(split()[0].tokens, other[0].tokens)


def test_segments_are_walked_in_the_listed_order_and_differ():
    segments = [
        {"seq_len": 16, "pairs": 2, "examples": 70},
        {"seq_len": 32, "pairs": 4, "examples": 40},
        {"seq_len": 16, "pairs": 2, "examples": 70},
    ]
    task = MQAR(vocab_size=64, train=[MQARSegment(**s) for s in segments], test=[MQARSegment(**s) for s in segments[:2]])
    split = TaskData(task, seed=0, steps=1, batch_size=32).split("train")
    shapes = [(batch.segment, *batch.tokens.shape) for batch in (split[i] for i in range(split.steps_per_epoch()))]
    assert shapes == [
        (0, 32, 16), (0, 32, 16), (0, 6, 16), (1, 32, 32), (1, 8, 32), (2, 32, 16), (2, 32, 16), (2, 6, 16)
    ]  # fmt: skip
    assert not torch.equal(split[0].tokens, split[5].tokens)
    assert slice_names(task.segments("test")) == ["n=2 T=16", "n=4 T=32"]


def test_an_endless_split_never_repeats():
    data = TaskData(Overwrite(vocab_size=32, seq_len=16, pairs=2, updates=2), seed=0, steps=40, batch_size=64)
    batches = list(data.train_dataloader())
    assert len(batches) == 40
    rows = torch.cat([batch.tokens for batch in batches])
    assert len(rows.unique(dim=0)) > 0.99 * len(rows)
    with pytest.raises(ValueError, match="needs a number of examples"):
        TaskData(Overwrite(test_examples=None), seed=0, steps=1, batch_size=4).test_dataloader()  # type: ignore[arg-type]


def test_a_loader_goes_on_where_it_was_stopped():
    data = TaskData(Overwrite(vocab_size=32, seq_len=16, pairs=2, updates=2), seed=3, steps=6, batch_size=8)
    whole = [batch.tokens for batch in data.train_dataloader()]
    first = data.train_dataloader()
    walk = iter(first)
    for _ in range(4):
        next(walk)
    second = data.train_dataloader()
    second.load_state_dict(first.state_dict())
    rest = [batch.tokens for batch in second]
    assert len(second) == 6
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_slices_name_updated_and_kept_keys():
    assert slice_names(Overwrite().segments("test")) == ["updated"]
    assert slice_names(Overwrite(updates=4).segments("test")) == ["updated", "kept"]
    segments = [ForgettingSegment(seq_len=32, pairs=4, updates=u, examples=8) for u in (2, 4)]
    names = slice_names(ForgettingMQAR(vocab_size=64, train=segments, test=segments).segments("test"))
    assert names == ["n=4 T=32 u=2 updated", "n=4 T=32 u=2 kept", "n=4 T=32 u=4 updated"]
    with pytest.raises(ValueError, match="lists a segment twice"):
        MQAR(vocab_size=64, test=[MQARSegment(seq_len=32, pairs=4, examples=8)] * 2).segments("test")
