"""In-context regression: what the examples mean, the error, and a run from configuration to table."""

import csv
import json

import pytest
import torch

from experiments import config
from experiments import run as command
from experiments.compare import plan, summarise
from experiments.metrics import ErrorMetrics
from experiments.model import RegressionModule, VectorLM, build_lm
from experiments.tasks import InContextRegression, Split, TaskData, VectorBatch, Vectors
from experiments.train import train

QUIET = ["execution.device=cpu", "execution.jobs=1"]


def batch_of(rows=64, **sizes):
    [segment] = InContextRegression(**sizes).segments("train")
    return segment.sample(rows, torch.Generator().manual_seed(0), 0)


def test_pairs_are_shown_whole_and_questions_without_their_answer():
    batch = batch_of(inputs=3, outputs=2, pairs=5, questions=4)
    x, y, mark = batch.inputs.split([3, 2, 1], dim=-1)
    assert batch.inputs.shape == (64, 9, 6) and batch.targets.shape == (64, 9, 2)
    assert batch.asked[:, 5:].all() and not batch.asked[:, :5].any()
    assert (mark[:, :5] == 0).all() and (mark[:, 5:] == 1).all()
    assert (y[:, 5:] == 0).all() and (batch.targets[:, :5] == 0).all()
    assert x.ne(0).all() and y[:, :5].ne(0).all() and batch.targets[:, 5:].ne(0).all()


def test_a_linear_function_is_found_by_least_squares_from_as_many_pairs_as_inputs():
    batch = batch_of(inputs=3, outputs=2, pairs=3, questions=4)
    x, y, _ = batch.inputs.double().split([3, 2, 1], dim=-1)
    weights = torch.linalg.solve(x[:, :3], y[:, :3])
    assert torch.allclose(x[:, 3:] @ weights, batch.targets[:, 3:].double(), atol=1e-2)


def test_the_network_is_not_linear():
    batch = batch_of(rows=32, function="mlp", inputs=2, outputs=1, pairs=200, questions=200)
    x, y, _ = batch.inputs.double().split([2, 1, 1], dim=-1)
    affine = torch.cat([x, torch.ones_like(y)], dim=-1)
    weights = torch.linalg.lstsq(affine[:, :200], y[:, :200]).solution
    error = (affine[:, 200:] @ weights - batch.targets[:, 200:]).square().sum() / batch.targets.square().sum()
    assert 0.1 < error < 0.6


@pytest.mark.parametrize("sizes", [{}, {"function": "mlp"}, {"function": "mlp", "gain": 0.5}, {"inputs": 3, "outputs": 1}], ids=str)
def test_answers_have_mean_square_one(sizes):
    batch = batch_of(rows=4096, **sizes)
    assert batch.targets[batch.asked].square().mean().item() == pytest.approx(1.0, rel=0.06)


def test_examples_are_a_function_of_seed_split_and_step():
    task = InContextRegression(inputs=2, outputs=1, pairs=3, questions=2, examples=1500)

    def rows(seed=0, name="train", batch_size=64):
        split = Split(task.segments(name), split=name, seed=seed, batch_size=batch_size)
        return torch.cat([split[step].inputs for step in range(split.steps_per_epoch() or 0)])

    assert torch.equal(rows(), rows(batch_size=700)) and len(rows()) == 1500
    assert not torch.equal(rows(), rows(seed=1)) and not torch.equal(rows()[:64], rows(name="test")[:64])
    first = Split(task.segments("train"), split="train", seed=0, batch_size=8)[0]
    assert isinstance(first, VectorBatch) and [t.dtype for t in first[:3]] == [torch.float32, torch.float32, torch.bool]


def test_a_loader_goes_on_where_it_was_stopped():
    data = TaskData(InContextRegression(inputs=2, outputs=1, pairs=3, questions=2), seed=3, steps=5, batch_size=8)
    whole = [batch.inputs for batch in data.train_dataloader()]
    later = data.train_dataloader()
    later.load_state_dict({"handed_out": 3})
    assert all(torch.equal(a, b.inputs) for a, b in zip(whole[3:], later, strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"questions": 0}, "questions must be at least 1, got 0"),
        ({"pairs": 0}, "pairs and test_pairs must be at least 1"),
        ({"test_pairs": [4, 4]}, "no number listed twice"),
        ({"function": "cubic"}, "task.function: Invalid value 'cubic'"),
    ],
)
def test_sizes_without_meaning_are_refused(sizes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.read_task({"kind": "in_context_regression", **sizes})


def test_the_error_of_answering_zero_is_one_and_of_the_truth_zero():
    task = InContextRegression(inputs=2, outputs=2, test_pairs=[4, 8])
    segments = task.segments("test")
    batches = [segment.sample(16, torch.Generator().manual_seed(1), i)._replace(segment=i) for i, segment in enumerate(segments)]
    metrics = ErrorMetrics(segments)
    for scale in (0.0, 0.25, 1.0):
        metrics.update(batches[0], scale * batches[0].targets[batches[0].asked])
        metrics.update(batches[1], batches[1].targets[batches[1].asked])
        values = {key: value.item() for key, value in metrics.report("val").items()}
        assert values["val/error/n=4"] == pytest.approx((1 - scale) ** 2) and values["val/error/n=8"] == 0
        share = batches[0].targets.square().sum() / sum(batch.targets.square().sum() for batch in batches)
        assert values["val/error"] == pytest.approx((1 - scale) ** 2 * share.item(), rel=1e-5)
        mean = (1 - scale) ** 2 * batches[0].targets[batches[0].asked].square().mean().item() / 2
        assert values["val/loss"] == pytest.approx(mean, rel=1e-5)


@pytest.fixture
def tiny_vectors(tiny, tmp_path):
    task = {
        "kind": "in_context_regression",
        "inputs": 2,
        "outputs": 1,
        "pairs": 6,
        "questions": 2,
        "test_pairs": [4, 6],
        "test_examples": 32,
    }
    return {**tiny, "task": task, "name": "vectors", "output": str(tmp_path)}


def test_vectors_go_through_the_model_causally_and_token_by_token(tiny_vectors):
    [entry] = config.load(tiny_vectors, ["mixer=delta"]).mixers
    model = {"d_model": 16, "mlp": None, "mlp_ratio": 1.0, "init_std": None, "tie_embeddings": True}
    lm = build_lm(Vectors(4, 3), model, entry.declaration).eval()
    x = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    y, state = lm.prefill(x[:, :5])
    y_t, _ = lm.step(x[:, 5], state)
    assert isinstance(lm, VectorLM) and y.shape == (2, 5, 3)
    assert torch.allclose(torch.cat([y, y_t[:, None]], 1), lm(x[:, :6]), atol=1e-5)
    lm.reset_parameters()
    assert lm(x).shape == (2, 7, 3) and "embedding.weight" not in lm.no_weight_decay()
    with pytest.raises(ValueError, match=r"vectors: got torch.int64 of shape \[2, 7\], expected floats \[B, T, inputs\]"):
        lm(torch.zeros(2, 7, dtype=torch.int64))


def test_an_interrupted_run_ends_with_the_same_metrics(tiny_vectors):
    settings = [*QUIET, "execution.checkpoint_every=3", "mixer=delta", "train.eval_every=4"]
    whole, broken = (config.load({**tiny_vectors, "name": name}, settings) for name in "ab")
    [run] = plan(whole)

    def stop(event):
        if event["step"] == 5:
            raise KeyboardInterrupt

    expected = train(run, whole.folder, whole.config.execution)
    with pytest.raises(KeyboardInterrupt):
        train(run, broken.folder, broken.config.execution, stop)
    result = train(run, broken.folder, broken.config.execution)
    assert all(result[key] == expected[key] for key in ("id", "steps", "score", "val", "test", "state_bytes"))
    module = RegressionModule.load_from_checkpoint(run.folder(whole.folder) / "final.ckpt", weights_only=True)
    assert module.lm(torch.zeros(1, 8, 4)).shape == (1, 8, 1)


def test_a_comparison_of_vectors_chooses_the_lowest_error(tiny_vectors, tmp_path, capsys):
    (tmp_path / "vectors.yaml").write_text(json.dumps(tiny_vectors))
    arguments = [str(tmp_path / "vectors.yaml"), "lrs=[1e-4,3e-2]", "train.steps=40", *QUIET]
    assert command.main(arguments) == 0
    assert "error" in capsys.readouterr().out
    folder = tmp_path / "vectors"
    assert (folder / "error.png").stat().st_size > 5000
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["slice"] for row in rows} == {"all slices", "n=4", "n=6"}
    made = config.load(arguments[0], arguments[1:])
    for line in summarise(made, plan(made)):
        val = {float(r["lr"]): float(r["error"]) for r in rows if (r["mixer"], r["split"], r["slice"]) == (line.label, "val", "all slices")}
        assert line.lr == min(val, key=lambda lr: val[lr])
