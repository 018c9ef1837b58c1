"""Pieces from outside: by decorator, and by the entry points of an installed package, loaded only when they are named."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import ttr
from ttr import registry, testing
from ttr.inner_optim import Delta
from ttr.signals import Signal, signal

REGISTRIES = {
    "ttr.regressors": registry.REGRESSORS, "ttr.objectives": registry.OBJECTIVES, "ttr.inner_optim": registry.OPTIMIZERS,
    "ttr.step_rules": registry.STEP_RULES, "ttr.mirrors": registry.MIRRORS, "ttr.gates": registry.GATES, "ttr.stages": registry.STAGES,
    "ttr.signal_maps": registry.SIGNAL_MAPS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers is forgotten after it."""
    for table in REGISTRIES.values():
        monkeypatch.setattr(table, "_classes", dict(table._classes))
    yield
    sys.modules.pop("ttr_extra", None)


def register_halved() -> type:
    @ttr.optimizer("halved")
    @dataclass(frozen=True, kw_only=True)
    class Halved(ttr.Optimizer):
        """W <- W - step g / 2, with a signal of its own that pulls the weights to zero."""

        linear = True
        step: Signal = signal("sigmoid")
        pull: Signal = signal(0.1)

        def update(self, z, g, s):
            return (z[0] - s.pull * z[0] - s.step * g / 2,)

    return Halved


def test_a_decorated_class_is_a_kind_like_any_other():
    Halved = register_halved()
    spec = ttr.spec({"optimizer": {"kind": "halved", "pull": {"map": "sigmoid", "bias": -2}}, "gate": "vector"})
    assert type(spec.optimizer) is Halved and list(spec.signals()) == ["step", "pull", "log_decay"]
    assert ttr.spec(spec.to_dict()) == spec == ttr.spec(spec.to_dict(full=True))
    assert ttr.spec({"optimizer": Halved()}) == ttr.spec({"optimizer": "halved"})
    with pytest.raises(ttr.SpecError, match=r"optimizer.kind='halfed' is not known.*'halved'.*Did you mean 'halved'\?"):
        ttr.spec({"optimizer": "halfed"})
    with pytest.raises(ttr.SpecError, match=r"optimizer.pul=1: Halved has no such field.*Did you mean 'pull'\?"):
        ttr.spec({"optimizer": {"kind": "halved", "pul": 1}})
    assert "chunk" in testing.targets(spec)
    testing.assert_conforms(spec, T=5, B=1)


@pytest.mark.parametrize("mini_batch", [1, 16])
def test_an_optimizer_without_signals(mini_batch):
    """It gets tensors all the same, on every path."""

    @ttr.optimizer("fixed_rate")
    @dataclass(frozen=True, kw_only=True)
    class FixedRate(ttr.Optimizer):
        linear = True
        rate: float = 0.1

        def update(self, z, g, s):
            return (z[0].sub(g, alpha=self.rate),)

    spec = ttr.spec({"optimizer": {"kind": "fixed_rate", "mini_batch": mini_batch}})
    testing.assert_conforms(spec, T=2 * mini_batch, B=1)


def test_every_slot_takes_third_parties():
    @ttr.regressor("squared")
    @dataclass(frozen=True, kw_only=True)
    class Squared(ttr.Regressor):
        def init(self, dk, dv):
            return {"W": ttr.normal(dk, dv)}

        def predict(self, w, x):
            return ttr.linear(x.square(), w["W"])

    @ttr.objective("quartic")
    @dataclass(frozen=True, kw_only=True)
    class Quartic(ttr.Objective):
        def loss(self, prediction, target, s):
            return (prediction - target).pow(4).sum()

    @ttr.step_rule("tamed")
    @dataclass(frozen=True, kw_only=True)
    class Tamed(ttr.StepRule):
        def effective(self, step, k, curvature):
            return step.tanh()

    @ttr.gate("half_life")
    @dataclass(frozen=True, kw_only=True)
    class HalfLife(ttr.Gate):
        tokens: float = 8.0

        def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
            return torch.full((n_heads,), -0.7 / self.tokens)

    @ttr.stage("cubed")
    @dataclass(frozen=True, kw_only=True)
    class Cubed(ttr.Stage):
        def __call__(self, x):
            return x**3

    @ttr.signal_map("tanh2")
    @dataclass(frozen=True, kw_only=True)
    class Tanh2(ttr.SignalMap):
        def __call__(self, z, params):
            return z.tanh() ** 2

    bare = {"layer": {"qk": ["cubed"], "v": [], "output": []}, "gate": {"kind": "half_life", "tokens": 4}}
    deep = ttr.spec({"regressor": "squared", "objective": "quartic", "optimizer": {"kind": "sgd", "step": "tanh2"}, **bare})
    flat = ttr.spec({"optimizer": {"kind": "delta", "step_rule": "tamed", "step": "tanh2"}, **bare})
    for spec in (deep, flat):
        assert ttr.spec(spec.to_dict()) == spec == ttr.spec(spec.to_dict(full=True))
    testing.assert_conforms(flat, T=5, B=1)
    x = testing.random_inputs(deep, T=3)
    assert torch.isfinite(testing.call(x)[0]).all()
    y = ttr.Mixer(8, flat, n_heads=2)(torch.randn(1, 5, 8))
    assert y.shape == (1, 5, 8)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    ("returned", "said"), [(lambda z, g: z[0] - g, "Tensor"), (lambda z, g: (z[0] - g,), "1 slots")], ids=["bare", "few"]
)
def test_an_update_that_returns_no_tuple_of_slots(linear, returned, said):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(ttr.Optimizer):
        kind: ClassVar[str] = "wrong"
        slots: ClassVar[tuple[str, ...]] = ("slow",)

        def update(self, z, g, s):
            return returned(z, g)

    Wrong.linear = linear  # type: ignore[misc]
    with pytest.raises(ttr.SpecError, match=rf"optimizer 'wrong': update returned {said}, expected a tuple of 2: \('weights', 'slow'\)"):
        testing.call(testing.random_inputs(ttr.Spec(optimizer=ttr.optimizer("wrong")(Wrong)()), T=3), "definition")


def test_what_a_kind_must_be():
    with pytest.raises(ttr.SpecError, match="optimizer kind 'thawed': Thawed must be a @dataclass"):

        @ttr.optimizer("thawed")
        @dataclass(kw_only=True)
        class Thawed:
            pass

    with pytest.raises(ttr.SpecError, match="optimizer kind 'bare': Bare must be a @dataclass"):  # its step would be the base's

        @ttr.optimizer("bare")
        class Bare(ttr.Optimizer):
            step: ttr.Signal = ttr.signal("sigmoid")

            def update(self, z, g, s):
                return (z[0] - s.step * g,)

    with pytest.raises(ttr.SpecError, match="gate kind 'misplaced': Misplaced must derive from the base class of this slot"):

        @ttr.gate("misplaced")
        @dataclass(frozen=True, kw_only=True)
        class Misplaced(Delta):
            pass

    for taken in ("delta", "multistep"):
        with pytest.raises(ttr.SpecError, match=f"optimizer kind {taken!r} is registered already"):

            @ttr.optimizer(taken)
            @dataclass(frozen=True, kw_only=True)
            class Other(Delta):
                pass


def test_a_class_defined_again_replaces_itself():
    """As in a notebook cell that is run twice."""
    first = ttr.spec({"optimizer": register_halved()()})
    second = ttr.spec({"optimizer": register_halved()()})
    assert type(first.optimizer) is not type(second.optimizer) and first.hash == second.hash
    assert ttr.spec({"optimizer": "halved"}) == second
    assert ttr.spec(first, read="before").optimizer == second.optimizer


def test_an_unregistered_subclass_is_not_taken_for_its_parent():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Delta):
        pass

    with pytest.raises(ttr.SpecError, match=r"optimizer=.*: Mine is not a registered optimizer; choose from \['adam'"):
        ttr.spec({"optimizer": Mine()})


PACKAGE = """
from dataclasses import dataclass
from typing import ClassVar
import ttr

@ttr.optimizer("borrowed")
@dataclass(frozen=True, kw_only=True)
class Borrowed(ttr.Optimizer):
    linear = True
    step: ttr.Signal = ttr.signal("softplus")

    def update(self, z, g, s):
        return (z[0] - s.step * g,)

@dataclass(frozen=True, kw_only=True)
class Silent(ttr.Gate):
    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return None

def no_class(): ...
"""
ENTRY_POINTS = """
[ttr.inner_optim]
borrowed = ttr_extra:Borrowed
broken = ttr_gone:Broken
function = ttr_extra:no_class
[ttr.gates]
silent = ttr_extra:Silent
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with pieces, installed beside this one."""
    (tmp_path / "ttr_extra.py").write_text(PACKAGE)
    info = tmp_path / "ttr_extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ttr-extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_entry_points_are_loaded_only_when_named(installed):
    for name in ttr.presets():
        ttr.spec(ttr.spec(name).to_dict())
    assert ttr.spec({"optimizer": "delta", "gate": "scalar"})
    with pytest.raises(ttr.SpecError, match=r"optimizer.kind='borowed' is not known.*'borrowed'.*Did you mean 'borrowed'\?"):
        ttr.spec({"optimizer": "borowed"})
    with pytest.raises(ttr.SpecError, match=r"gate.kind='borrowed' is not known.*'silent'"):
        ttr.spec({"optimizer": "delta", "gate": "borrowed"})
    assert "ttr_extra" not in sys.modules
    spec = ttr.spec({"optimizer": "borrowed", "gate": "silent"})
    assert "ttr_extra" in sys.modules
    assert type(spec.optimizer).__module__ == "ttr_extra" and spec.optimizer.kind == "borrowed" and spec.gate.kind == "silent"
    assert ttr.spec(spec.to_dict()) == spec
    testing.assert_conforms(spec, T=5, B=1)


def test_a_broken_package_harms_only_those_who_name_it(installed):
    with pytest.raises(
        ttr.SpecError, match=r"optimizer.kind='broken': 'ttr_gone:Broken', which offers it, cannot be imported: ModuleNotFound"
    ):
        ttr.spec({"optimizer": "broken"})
    with pytest.raises(ttr.SpecError, match="optimizer kind 'function': no_class must be a @dataclass"):
        ttr.spec({"optimizer": "function"})
    assert ttr.spec({"optimizer": "borrowed"}).optimizer.kind == "borrowed"


@pytest.mark.parametrize("group", REGISTRIES)
def test_every_slot_has_an_entry_point_group(group, monkeypatch):
    """And it asks the metadata only for a kind that nobody registered."""
    table, asked = REGISTRIES[group], []

    class Entry:
        name, value = "borrowed", "somewhere:Borrowed"

        def load(self):
            base = next(cls for cls in type(next(iter(instances(table)))).__mro__ if "registry" in vars(cls))
            return dataclass(frozen=True, kw_only=True)(type("Borrowed", (base,), {}))

    def entry_points(*, group):
        asked.append(group)
        return [Entry()]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    for kind in table.kinds():
        table.get(kind)
    assert asked == []
    assert table.get("borrowed").__name__ == "Borrowed" and asked == [group]
    table.get("borrowed")
    assert asked == [group]


def instances(table: registry.Registry) -> list:
    """One instance of every kind that needs no arguments."""
    return [table.get(kind)() for kind in table.kinds()]
