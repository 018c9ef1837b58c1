"""Runs: an interrupted one ends as if it had not been, a finished one is not repeated, a comparison adds up."""

import csv
import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from experiments import config, model
from experiments import run as command
from experiments.compare import execute, parallel_jobs, plan, sizes, summarise
from experiments.metrics import SliceMetrics
from experiments.model import LrScale, RecallModule
from experiments.progress import RunBars
from experiments.report import result_table
from experiments.tasks import IGNORE, Overwrite
from experiments.train import total_steps, train

QUIET = ["execution.device=cpu", "execution.jobs=1"]


@pytest.fixture
def experiment(tiny, tmp_path):
    def load(*overrides, folder="."):
        return config.load({**tiny, "name": "tiny", "output": str(tmp_path / folder)}, [*QUIET, *overrides])

    return load


class StopAt:
    """A `report` that interrupts the run at a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step, self.steps = step, []

    def __call__(self, event):
        self.steps.append(event["step"])
        if event["step"] == self.step:
            raise KeyboardInterrupt


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def outcome(result):
    return {key: result[key] for key in ("id", "parameters", "state_bytes", "steps", "val", "test")}


@pytest.mark.parametrize("stop", [5, 8])  # between two checkpoints; right after a look at the val split
def test_an_interrupted_run_ends_with_the_same_metrics(tiny, tmp_path, stop):
    # two segments, so that the order of the data matters, and more than one epoch
    segments = [{"seq_len": 16, "pairs": 2, "examples": 20}, {"seq_len": 32, "pairs": 4, "examples": 12}]
    task = {"kind": "mqar", "vocab_size": 32, "train": segments, "test": segments}
    settings = ["execution.checkpoint_every=3", "mixer=delta", "train.eval_every=4", "train.steps=14"]
    whole, broken = (config.load({**tiny, "task": task, "name": name, "output": str(tmp_path)}, [*QUIET, *settings]) for name in "ab")
    [run] = plan(whole)

    expected = train(run, whole.folder, whole.config.execution)
    with pytest.raises(KeyboardInterrupt):
        train(run, broken.folder, broken.config.execution, StopAt(stop))
    again = StopAt(None)
    result = train(run, broken.folder, broken.config.execution, again)

    assert again.steps[0] == 3 * (stop // 3) + 1  # it did go on from the checkpoint
    assert outcome(result) == outcome(expected)
    assert metrics(run.folder(broken.folder)) == metrics(run.folder(whole.folder))
    weights = [torch.load(run.folder(e.folder) / "final.ckpt", weights_only=True)["state_dict"] for e in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_finished_runs_are_skipped_and_their_id_is_what_decides_the_result(experiment):
    first = experiment("mixer=delta")
    [run] = plan(first)
    result = train(run, first.folder, first.config.execution)
    assert train(run, first.folder, first.config.execution, StopAt(1)) == result  # nothing was trained

    def run_id(*overrides):
        return plan(experiment(*overrides))[0].id

    same = [
        ["mixer=delta", "execution.checkpoint_every=7", "execution.workers=1"],
        ["mixer={regressor: linear, objective: l2, optimizer: {kind: sgd, step: sigmoid}}"],  # delta, spelled out
    ]
    other = [
        ["mixer=linear"],
        ["mixer=delta", "seeds=[1]"],
        ["mixer=delta", "train.lr=1e-3"],
        ["mixer=delta", "lrs=[1e-3]"],
        ["mixer=delta", "task.pairs=1", "task.updates=1"],
        ["mixer=delta", "model.layer.head_dim=4"],
    ]
    assert all(run_id(*overrides) == run.id for overrides in same)
    assert len({run.id, *(run_id(*overrides) for overrides in other)}) == len(other)  # lrs=[x] is train.lr=x


def test_a_comparison_trains_all_and_writes_table_and_picture(tiny, tmp_path, capsys):
    arguments = [str(tmp_path / "tiny.yaml"), f"output={tmp_path}", "seeds=[0,1]", "lrs=[1e-3,1e-2]", *QUIET]
    OmegaConf.save(OmegaConf.create(tiny), tmp_path / "tiny.yaml")
    assert command.main([*arguments, "--dry-run"]) == 0
    assert "8 runs, 0 of them finished" in capsys.readouterr().out
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "old value" in shown
    folder = tmp_path / "tiny"
    assert (folder / "accuracy.png").stat().st_size > 5000

    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 2 * 2  # runs, splits, (all slices, updated)
    made = config.load(arguments[0], arguments[1:])
    summaries = summarise(made, plan(made))
    assert [line.label for line in summaries] == ["delta", "linear"]
    for line in summaries:
        mine = [row for row in rows if row["mixer"] == line.label and row["slice"] == "updated"]
        val = {lr: sum(float(r["accuracy"]) for r in mine if r["split"] == "val" and float(r["lr"]) == lr) for lr in (1e-3, 1e-2)}
        assert line.lr == max(val, key=lambda lr: val[lr])
        test = [float(r["accuracy"]) for r in mine if r["split"] == "test" and float(r["lr"]) == line.lr]
        assert line.seeds == 2
        assert line.mean["updated"] == pytest.approx(sum(test) / 2)
        assert line.sd["updated"] == pytest.approx(abs(test[0] - test[1]) / math.sqrt(2))
    assert result_table(summaries, "").row_count == 2

    before = {path: path.stat().st_mtime for path in folder.rglob("result.json")}
    assert command.main(arguments) == 0
    assert "8 of 8 runs are finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime for path in folder.rglob("result.json")} == before


def test_runs_in_parallel_give_the_same_results(experiment):
    alone, pool = experiment(folder="a"), experiment("execution.jobs=2", folder="b")
    for made in (alone, pool):
        with RunBars(Console(quiet=True), show=False) as bars:
            assert execute(made, plan(made), bars) == []
    for a, b in zip(plan(alone), plan(pool), strict=True):
        results = [json.loads((r.folder(e.folder) / "result.json").read_text()) for r, e in ((a, alone), (b, pool))]
        assert outcome(results[0]) == outcome(results[1])


def test_a_failing_run_does_not_stop_the_others(experiment, monkeypatch):
    made = experiment()
    honest = model.RecallModule.training_step

    def training_step(self, batch, index):
        if self.lm_is_linear:
            raise FloatingPointError("no luck")
        return honest(self, batch, index)

    monkeypatch.setattr(RecallModule, "training_step", training_step)
    monkeypatch.setattr(
        RecallModule,
        "lm_is_linear",
        property(lambda self: self.hparams.declarations[0]["optimizer"] == "sgd"),
        raising=False,
    )
    with RunBars(Console(quiet=True), show=False) as bars:
        [failure] = execute(made, plan(made), bars)
    assert failure.startswith("linear · seed 0")
    assert "no luck" in failure
    assert [line.label for line in summarise(made, plan(made))] == ["delta"]


def test_metrics_count_what_they_say():
    [segment] = Overwrite(vocab_size=32, seq_len=32, pairs=4, updates=2).segments("test")
    batch = segment.sample(3, torch.Generator().manual_seed(0), 0)
    labels, stale = batch.labels[batch.labels != IGNORE], batch.stale[batch.labels != IGNORE]
    updated, kept = (stale != IGNORE).nonzero().flatten(), (stale == IGNORE).nonzero().flatten()
    answers = labels.clone()
    answers[updated[:3]] = stale[updated[:3]]  # 3 of 6 answered with the outdated value
    answers[kept[:1]] = 0  # 1 of 6 answered with nonsense
    metrics = SliceMetrics([segment])
    metrics.update(batch, answers, torch.arange(12.0))
    values = {key: value.item() for key, value in metrics.report("val").items()}
    assert values == pytest.approx(
        {
            "val/loss": 5.5,
            "val/accuracy": 8 / 12,
            "val/accuracy/updated": 3 / 6,
            "val/accuracy/kept": 5 / 6,
            "val/old/updated": 3 / 6,
        }
    )


def test_weight_decay_spares_what_the_model_says(experiment):
    [run] = plan(experiment("mixer=delta"))
    module = RecallModule(32, run.model, run.declaration, run.train, 10)
    optimizer = module.configure_optimizers()["optimizer"]
    spared = {id(p) for p in optimizer.param_groups[1]["params"]}
    expected = {id(p) for name, p in module.lm.named_parameters() if name in module.lm.no_weight_decay()}
    assert spared == expected
    assert len(expected) > 0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.lm.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_a_trained_model_loads_from_its_file_alone(experiment):
    made = experiment("mixer=delta")
    [run] = plan(made)
    train(run, made.folder, made.config.execution)
    module = RecallModule.load_from_checkpoint(run.folder(made.folder) / "final.ckpt", weights_only=True)
    assert module.lm(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 32)


def test_the_schedule_warms_up_and_falls_to_zero():
    scale = LrScale(100, warmup=0.1, schedule="cosine")
    assert [scale(0), scale(9), scale(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert scale(55) == pytest.approx(0.5)
    assert scale(100) == pytest.approx(0.0)
    assert LrScale(100, warmup=0.0, schedule="constant")(70) == 1.0


def test_epochs_are_counted_in_steps(experiment):
    made = experiment("task.examples=33", "train.steps=null", "train.epochs=3", "train.batch_size=8")
    assert total_steps(plan(made)[0]) == 15
    endless = experiment("train.steps=null", "train.epochs=3")
    with pytest.raises(ValueError, match="this one is endless"):
        total_steps(plan(endless)[0])


def test_softmax_keeps_every_token_and_a_linear_memory_does_not(experiment):
    def bytes_of(*overrides):
        softmax = "mixers.softmax={regressor: kernel}"
        made = experiment(softmax, *overrides)
        return {size.label: size.state_bytes for size in sizes(made)}

    short, long = bytes_of("task.seq_len=16"), bytes_of("task.seq_len=32")
    assert short["delta"] == long["delta"]
    assert short["softmax"] < long["softmax"]


def test_jobs_are_the_cores_on_the_cpu_and_one_on_a_gpu():
    automatic = config.ExecutionConfig()
    assert parallel_jobs(automatic, "cpu", runs=100) >= 1
    assert parallel_jobs(automatic, "cuda", runs=100) == 1
    assert parallel_jobs(config.ExecutionConfig(jobs=8), "cuda", runs=100) == 8
    assert parallel_jobs(config.ExecutionConfig(jobs=8), "cpu", runs=3) == 3


def test_the_command_lists_prints_and_refuses(capsys):
    assert command.main(["--list"]) == 0
    assert "recall: " in capsys.readouterr().out
    assert command.main(["recall", "--print-config", "train.lr=1e-4", "mixer=delta"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.train.lr == 1e-4
    assert list(printed.mixers) == ["delta"]
    assert command.main(["recall", "mixer=delta", "mixer.optimizer.stpe=1"]) == 2
    assert "stpe" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([])
