"""Configurations are strict, and say what was wrong by its full name."""

import pytest

import ttr
from experiments import config
from experiments.config import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.lr=3", r"unknown key 'trian'. Did you mean 'train'\?"),
        ("train.lrr=3", r"unknown key 'train.lrr'. Did you mean 'train.lr'\?"),
        ("execution.job=3", r"unknown key 'execution.job'. Did you mean 'execution.jobs'\?"),
        ("task.pair=3", r"unknown key 'task.pair'. Did you mean 'task.pairs'\?"),
        ("task.kind=mqr", "task.kind='mqr' is not a task; choose from"),
        ("task.pairs=9", "task: seq_len 16 is too short"),
        ("untrained.rule={}", "unknown key 'untrained.rule'"),
        ("train.lr=fast", "train.lr: Value 'fast'"),
        ("train.schedule=linear", "train.schedule: Invalid value 'linear', expected one of"),
        ("train.epochs=2", "give one of train.steps and train.epochs, got 12 and 2"),
        ("train.batch_size=0", "train.batch_size=0: expected at least 1"),
        ("seeds=[]", "seeds is empty"),
        ("seeds=0", r"seeds: expected a list, as \[0\]"),
        ("mixer=[delta,linear]", r"mixer 'delta\+linear' lists 2 declarations, which does not divide model.n_layers=1"),
        ("mixer=dleta", r"Did you mean 'delta'\?"),
        ("mixer.optimizer=momentum", r"say which with mixer=NAME; this experiment has \['delta', 'linear'\]"),
        ("mixers.delta.optimiser=delta", "mixer 'delta': .*optimiser"),
        ("train.lr", "expected key=value, got 'train.lr'"),
        ("train.lr=-1", "train.lr=-1.0: expected learning rates > 0"),
        ("lrs=[1e-3,0]", r"lrs=\[0.001, 0.0\]: expected learning rates > 0"),
        ("mixers=delta", r"mixers='delta': expected a list, as \[delta\]"),
        ("seeds=[0", r"'seeds=\[0': the value is no YAML"),
    ],
)
def test_what_cannot_be_run_is_refused(tiny, override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(tiny, [override])


def test_an_unknown_key_inside_a_list_is_named_with_its_place(tiny):
    task = {"kind": "mqar", "test": [{"seq_len": 64, "pairs": 4, "examples": 1}, {"seq_len": 64, "pair": 4}]}
    with pytest.raises(ConfigError, match=r"unknown key 'task.test\[1\].pair'. Did you mean 'task.test\[1\].pairs'\?"):
        config.load({**tiny, "task": task})


def test_an_unknown_configuration_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"Did you mean 'recall'\?"):
        config.load("recal")
    with pytest.raises(ConfigError, match="no such file"):
        config.load("nowhere/recall.yaml")


def test_one_mixer_can_be_chosen_and_changed(tiny):
    def declarations(*overrides):
        return {mixer.label: mixer.declaration for mixer in config.load(tiny, overrides).mixers}

    assert list(declarations("mixer=delta")) == ["delta"]
    assert list(declarations("mixers=[linear]")) == ["linear"]
    with pytest.raises(ConfigError, match=r"mixer is given twice: 'delta' and 'linear'; several are mixers=\[a,b\]"):
        declarations("mixer=delta", "mixer=linear")
    changed = declarations("mixer=delta", "mixer.optimizer=momentum")
    assert list(changed) == ["delta optimizer=momentum"]
    assert changed["delta optimizer=momentum"][0]["optimizer"] == "momentum"
    preset = declarations("mixer=deltanet", "mixer.layer.head_dim=4")["deltanet layer.head_dim=4"]
    assert preset[0]["layer"]["head_dim"] == 4
    mapping = declarations("mixer={regressor: linear, optimizer: {kind: delta, steps: 2}}")["custom"]
    assert mapping[0]["optimizer"]["steps"] == 2
    assert mapping[0]["layer"]["head_dim"] == 8  # of model.layer, as every mixer of the experiment
    hybrid = declarations("mixer=[delta,linear]", "model.n_layers=2")["delta+linear"]
    assert [block["optimizer"] for block in hybrid] == ["delta", "sgd"]


def test_a_composition_is_a_mixer_as_any_other(tiny):
    experiment = config.load(tiny, ["mixer=titans_mag", "mixer.compose.persistent=2"])
    (mixer,) = experiment.mixers
    assert mixer.label == "titans_mag compose.persistent=2" and config.load(experiment.to_dict()) == experiment
    declared = ttr.declare(mixer.declaration[0])
    assert declared.persistent == 2 and declared.memory.layer.head_dim == declared.window.layer.head_dim == 8  # of model.layer
    own = {"base": "titans_mag", "compose": {"window": {"base": "softmax_window", "layer": {"head_dim": 4}}}}
    (changed,) = config.load({**tiny, "mixers": {"changed": own}}).mixers
    assert ttr.declare(changed.declaration[0]).window.layer.head_dim == 4


def test_the_printed_configuration_reads_back_the_same(tiny):
    experiment = config.load(tiny, ["train.lr=1e-3", "mixer=delta", "seeds=[1,2]"])
    assert config.load(experiment.to_dict()) == experiment


@pytest.mark.parametrize("name", config.names())
def test_every_configuration_of_the_package_can_be_read(name):
    experiment = config.load(name)
    assert experiment.config.name == name
    assert experiment.config.title
    assert experiment.mixers
