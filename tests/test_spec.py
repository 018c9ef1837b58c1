"""A declaration means the same however it is written: read back from its own text, spelled otherwise, based on another."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf
from sampling import Sampler, every_kind

import ttr
from ttr.gates import Scalar
from ttr.inner_optim import SGD, Delta, Momentum
from ttr.objectives import L2
from ttr.regressors import MLP, Linear
from ttr.signals import make_signal

SAMPLES = 500


def plain(data: Any) -> bool:
    """Only what JSON and YAML can hold."""
    if isinstance(data, dict):
        return all(isinstance(k, str) and plain(v) for k, v in data.items())
    return all(map(plain, data)) if isinstance(data, list) else data is None or type(data) in (str, int, float, bool)


def same(left: ttr.Spec, right: ttr.Spec) -> None:
    assert left == right
    assert left.hash == right.hash
    assert hash(left) == hash(right)
    assert left.to_dict(full=True) | {"name": None} == right.to_dict(full=True) | {"name": None}
    assert ttr.select_path(left) == ttr.select_path(right)


# Round trips


@pytest.mark.parametrize("name", ttr.presets())
def test_presets_round_trip(name, tmp_path):
    spec, path = ttr.spec(name), tmp_path / "layer.yaml"
    assert spec.name == name
    for full in (False, True):
        data = spec.to_dict(full)
        assert plain(data), data
        path.write_text(spec.to_yaml(full))
        for form in (data, json.loads(json.dumps(data)), OmegaConf.create(data), path, str(path)):
            again = ttr.spec(form)
            same(again, spec)
            assert again.name == name
    same(pickle.loads(pickle.dumps(spec)), spec)


@pytest.fixture(scope="module")
def sampled() -> list[ttr.Spec]:
    sampler = Sampler(seed=1)
    return [sampler.spec() for _ in range(SAMPLES)]


def test_sampled_declarations_round_trip(sampled):
    for spec in sampled:
        for form in (spec.to_dict(), spec.to_dict(full=True), OmegaConf.create(spec.to_yaml())):
            again = ttr.spec(form)
            assert (again, again.hash) == (spec, spec.hash), form
        assert plain(spec.to_dict(full=True))


def test_the_sample_holds_every_kind(sampled):
    seen = set()
    for spec in sampled:
        stages = [s for stream in ("q", "k", "v", "write_key", "output") for s in getattr(spec.layer, stream) or ()]
        for piece in (spec.regressor, spec.objective, spec.optimizer, spec.gate, *stages):
            if piece is not None:
                seen.add((piece.registry.slot, piece.kind))
    assert seen >= every_kind()


def test_hashes_tell_declarations_apart(sampled):
    specs = [*sampled, *(ttr.spec(name) for name in ttr.presets())]
    assert len({s.hash for s in specs}) == len(set(specs)) > 0.9 * SAMPLES
    assert all(len(s.hash) == 12 and int(s.hash, 16) >= 0 for s in specs)


def test_no_two_presets_are_one_declaration():
    hashes = {name: ttr.spec(name).hash for name in ttr.presets()}
    assert len(set(hashes.values())) == len(hashes)


# Spellings


def optimizer(**fields: Any) -> dict[str, Any]:
    return {"optimizer": fields}


DELTA = {"optimizer": "delta"}
SAME = {
    "sgd on l2 is delta": [
        {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": "l2"},
        DELTA,
        {"optimizer": "delta", "objective": {"kind": "l2", "reduce": "sum"}},
        ttr.Spec(optimizer=SGD(step=make_signal("sigmoid")), objective=L2()),
        ttr.Spec(optimizer="delta"),
    ],
    "sgd's step of one": [
        {"optimizer": "sgd", "objective": "l2"},
        {"optimizer": {"kind": "sgd", "step": 1}, "objective": "l2"},
        optimizer(kind="delta", step=1.0),
        optimizer(kind="delta", step={"value": 1}),
    ],
    "sgd on the l2 of an mlp is delta": [
        {"regressor": "mlp", "optimizer": {"kind": "sgd", "step": "sigmoid", "mini_batch": 4}, "objective": {"kind": "l2", "reduce": "mean"}},
        {"regressor": "mlp", "optimizer": {"kind": "delta", "mini_batch": 4}, "objective": {"kind": "l2", "reduce": "mean"}},
    ],
    "sgd on linear descends dot": [{"optimizer": "sgd"}, {"optimizer": "sgd", "objective": "dot"}, {"optimizer": {"kind": "sgd"}}],
    "others descend l2": [{"optimizer": "momentum"}, {"optimizer": "momentum", "objective": "l2"}],
    "multistep": [
        optimizer(kind="multistep", steps=3),
        optimizer(kind="delta", steps=3),
        {"optimizer": {"kind": "sgd", "step": "sigmoid", "steps": 3}, "objective": "l2"},
    ],
    "multistep of one step": [{"optimizer": "multistep"}, DELTA],
    "one step has one pair": [optimizer(kind="delta", pairs="shared"), DELTA],
    "nlms": [
        {"optimizer": "nlms"},
        optimizer(kind="delta", step_rule="nlms"),
        optimizer(kind="delta", step_rule={"kind": "nlms", "eps": 1e-6}),
        optimizer(kind="nlms", step_rule="nlms"),
        optimizer(kind="nlms", step_rule={"eps": 1e-6}),
    ],
    "implicit": [
        {"optimizer": "implicit"},
        optimizer(kind="delta", step_rule="implicit", step="softplus"),
        optimizer(kind="implicit", step={"map": "softplus"}),
        {"optimizer": {"kind": "sgd", "step_rule": "implicit", "step": "softplus"}, "objective": "l2"},
    ],
    "implicit keeps its map": [
        optimizer(kind="implicit", step={"bias": -1}),
        optimizer(kind="delta", step_rule="implicit", step={"map": "softplus", "bias": -1.0}),
    ],
    "implicit with a number": [
        optimizer(kind="implicit", step=2),
        optimizer(kind="implicit", step={"value": 2.0}),
        optimizer(kind="delta", step_rule="implicit", step=2.0),
    ],
    "bare words": [
        {"regressor": "mlp", "objective": "l2", "optimizer": "momentum", "gate": "scalar", "read": "before"},
        {
            "regressor": {"kind": "mlp"}, "objective": {"kind": "l2"}, "optimizer": {"kind": "momentum"},
            "gate": {"kind": "scalar"}, "read": {"at": "before"},
        },
    ],
    "no gate": [DELTA, {**DELTA, "gate": "none"}, {**DELTA, "gate": None}, {**DELTA, "gate": {"kind": "none", "order": "coupled"}}],
    "defaults": [
        DELTA,
        {
            "regressor": {"kind": "linear", "initial": "zero"}, "objective": "l2", "gate": "none", "read": "after",
            "optimizer": {"kind": "delta", "step": "sigmoid", "steps": 1, "mini_batch": 1}, "layer": {},
        },
        {**DELTA, "regressor": None, "objective": None, "read": None, "layer": None},
    ],
    "a signal": [
        optimizer(kind="delta", step="sigmoid"),
        optimizer(kind="delta", step={"map": "sigmoid"}),
        optimizer(kind="delta", step={"map": {"kind": "sigmoid"}, "scale": 1}),
        optimizer(kind="delta", step={}),
    ],
    "a gate is a signal": [
        {**DELTA, "gate": "vector"},
        {**DELTA, "gate": {"kind": "vector", "per": "key", "rank": "head_dim", "map": {"kind": "mamba", "A": [1, 16]}, "order": "first"}},
    ],
    "a constant gate": [
        {**DELTA, "gate": {"kind": "scalar", "value": -1}},
        {**DELTA, "gate": {"kind": "scalar", "value": -1.0, "per": "head"}},
        ttr.Spec(optimizer=Delta(), gate=Scalar(log_decay_signal=make_signal(-1.0))),
    ],
    "qk is q and k": [
        {**DELTA, "layer": {"qk": ["conv", {"kind": "l2"}]}},
        {**DELTA, "layer": {"q": [{"kind": "conv", "kernel_size": 4}, "l2"], "k": ["conv", "l2"]}},
    ],
    "default streams": [
        DELTA,
        {**DELTA, "layer": {"qk": ["conv", "silu", "l2"], "v": ["conv", "silu"], "output": ["rms", "gate"]}},
        {**DELTA, "layer": {"q": None}},
    ],
    "kernel": [{"regressor": "kernel"}, {"regressor": {"kind": "kernel", "window": None}, "layer": {"qk": ["rope"], "v": [], "output": []}}],
    "the name does not count": [DELTA, {**DELTA, "name": "mine"}, {**DELTA, "name": "yours"}],
    "numbers": [
        {"regressor": {"kind": "mlp", "expansion": 2}, **DELTA},
        {"regressor": {"kind": "mlp", "expansion": 2.0}, **DELTA},
        ttr.Spec(regressor=MLP(expansion=2), optimizer=Delta()),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_equivalent_declarations_are_one_spec(name):
    first, *others = (ttr.spec(form) for form in SAME[name])
    assert others
    for other in others:
        same(other, first)


def test_groups_are_told_apart():
    """Groups of spellings that mean different things have different hashes."""
    by_hash: dict[str, set[str]] = {}
    for name, forms in SAME.items():
        by_hash.setdefault(ttr.spec(forms[0]).hash, set()).add(name)
    delta = {
        "sgd on l2 is delta", "multistep of one step", "one step has one pair", "no gate", "defaults", "a signal",
        "default streams", "the name does not count",
    }  # fmt: skip
    assert sorted(map(sorted, by_hash.values())) == sorted([sorted(delta), *([n] for n in SAME if n not in delta)])


@pytest.mark.parametrize("change", [
    {"optimizer.step.bias": 0.0}, {"optimizer.steps": 2}, {"optimizer.mini_batch": 2}, {"gate": "scalar"}, {"read": "before"},
    {"read.scale": 1.0}, {"regressor.initial": "learned"}, {"objective.reduce": "mean"}, {"layer.q": []}, {"layer.head_dim": 32},
    {"optimizer.step_rule": "nlms"}, {"optimizer.write_key": "separate"}, {"optimizer": "momentum"}, {"optimizer.step.per": "key"},
])  # fmt: skip
def test_what_makes_a_difference(change):
    delta = ttr.spec(DELTA)
    changed = ttr.spec(delta, **change)
    assert changed != delta and changed.hash != delta.hash


# Bases and overrides


def test_base_merges_and_replaces():
    base = ttr.spec("kda")
    merged = ttr.spec({"base": "kda", "optimizer": {"steps": 2, "step": {"scale": 2}}, "layer": {"head_dim": 32}})
    assert merged.optimizer == dataclasses.replace(base.optimizer, steps=2, step=make_signal("sigmoid", scale=2.0))
    assert merged.layer == dataclasses.replace(base.layer, head_dim=32)
    assert (merged.gate, merged.read, merged.regressor) == (base.gate, base.read, base.regressor)
    replaced = ttr.spec({"base": "kda", "optimizer": {"kind": "delta", "steps": 2}, "gate": "scalar", "layer": {"output": []}})
    assert replaced.optimizer == Delta(steps=2) and replaced.gate == Scalar() and replaced.layer.output == ()
    assert merged.name is None, "a layer that differs from its base does not bear its name"
    assert ttr.spec({"base": "kda", "name": "wide"}).name == "wide"


def test_base_may_be_any_source(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer: momentum")
    for source in ({"optimizer": "momentum"}, ttr.Spec(optimizer=Momentum()), tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        assert ttr.spec({"base": source, "gate": "scalar"}) == ttr.spec({"optimizer": "momentum", "gate": "scalar"})


def test_a_mapping_merges_into_a_bare_word():
    """A word is shorthand, of which the rest can be declared later: kinds, maps and when to read."""
    base = {
        "regressor": "linear", "optimizer": {"kind": "implicit", "step_rule": "implicit"},
        "gate": {"kind": "scalar", "map": "mamba"}, "read": "before",
    }  # fmt: skip
    spec = ttr.spec(base, **{"optimizer.step.bias": -1.0, "gate.map.A": [1, 2], "read.scale": 0.5, "regressor.initial": "learned"})
    assert spec == ttr.spec({
        "regressor": {"kind": "linear", "initial": "learned"},
        "optimizer": {"kind": "implicit", "step": {"map": "softplus", "bias": -1.0}},
        "gate": {"kind": "scalar", "map": {"kind": "mamba", "A": [1, 2]}},
        "read": {"at": "before", "scale": 0.5},
    })  # fmt: skip
    assert ttr.spec({"optimizer": "nlms"}, **{"optimizer.step_rule.eps": 0.1}).optimizer.step_rule.eps == 0.1
    for source in ("kda", ttr.spec("kda"), {"optimizer": "delta", "gate": "vector"}):
        assert ttr.spec(source, **{"gate.map.A": [1, 2]}).gate.log_decay_signal.map.A == (1.0, 2.0)
    assert ttr.spec({"optimizer": {"kind": "delta", "step": 1.0}}, **{"optimizer.step.bias": 0.0}).optimizer.step.bias == 0.0


def test_a_chain_of_files_is_read_from_where_each_lies(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "top.yaml").write_text("base: deep/middle.yaml\nname: top\nlayer: {head_dim: 16}\n")
    (tmp_path / "deep" / "middle.yaml").write_text("base: bottom.yaml\nname: middle\nlayer: {head_dim: 8, expand_v: 2}\n")
    (tmp_path / "deep" / "bottom.yaml").write_text("base: gla\ngate: {bias: 1.0}\n")
    gla, spec = ttr.spec("gla"), ttr.spec(tmp_path / "top.yaml")
    assert spec.name == "top" and (spec.layer.head_dim, spec.layer.expand_v) == (16, 2.0)
    assert spec.gate.log_decay_signal == dataclasses.replace(gla.gate.log_decay_signal, bias=1.0)
    monkeypatch.chdir(tmp_path / "deep")
    assert ttr.spec("../top.yaml") == spec and ttr.spec("middle.yaml").layer.head_dim == 8


def test_a_cycle_of_bases_is_refused(tmp_path):
    for name, base in {"a": "b.yaml", "b": "c.yaml", "c": "a.yaml", "self": "self.yaml"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\noptimizer: delta\n")
    with pytest.raises(ttr.SpecError, match=r"base='a.yaml' leads back to itself through .*a.yaml.*b.yaml.*c.yaml"):
        ttr.spec(tmp_path / "a.yaml")
    with pytest.raises(ttr.SpecError, match=r"base='self.yaml' leads back to itself"):
        ttr.spec({"base": tmp_path / "self.yaml"})


def test_overrides_are_dotted_keys_or_slots():
    spec = ttr.spec("kda", optimizer="momentum", **{"layer.n_heads": 4, "gate.map.A": [1, 2], "layer.qk": [], "optimizer.step.bias": 1})
    assert spec == ttr.spec({
        "base": "kda", "optimizer": {"kind": "momentum", "step": {"map": "sigmoid", "bias": 1.0}},
        "gate": {"map": {"kind": "mamba", "A": [1.0, 2.0]}}, "layer": {"n_heads": 4, "q": [], "k": []},
    })  # fmt: skip
    assert ttr.spec(spec, **{"layer.n_heads": 2}).layer.n_heads == 2 and spec.layer.n_heads == 4
    assert ttr.spec(spec, read="before").read.at == "before"
    assert ttr.spec(spec, optimizer=Delta(steps=2)).optimizer == Delta(steps=2)
    assert ttr.spec({"optimizer": Delta()}, **{"optimizer.steps": 2}).optimizer == Delta(steps=2)
    assert ttr.spec("softmax_window", **{"regressor.window": None}) == ttr.spec("softmax")
    assert ttr.spec("deltanet", regressor={"kind": "kernel"}, objective=None, optimizer=None).objective is None


def test_a_spec_is_given_back_as_it_is():
    spec = ttr.spec("kda")
    assert ttr.spec(spec) is spec and ttr.spec("kda") is spec
    assert dataclasses.replace(spec, optimizer="momentum").optimizer == Momentum()
    assert ttr.Spec(regressor="linear", optimizer={"kind": "delta"}).regressor == Linear()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"


def test_a_printed_declaration_can_be_read_again():
    for name in ("kda", "titans"):
        assert ttr.spec(OmegaConf.to_container(OmegaConf.create(str(ttr.spec(name))))) == ttr.spec(name)
