"""What a declaration may not say: every refusal names the full key, what came, the choices and the reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

import ttr
from ttr import registry
from ttr.gates import Gate, Scalar
from ttr.inner_optim import Delta
from ttr.objectives import L2, Dot, Objective
from ttr.signals import Signal, signal

NAN = float("nan")


def opt(**fields: Any) -> dict[str, Any]:
    return {"optimizer": {"kind": "delta", **fields}}


def gate(**fields: Any) -> dict[str, Any]:
    return {"optimizer": "delta", "gate": fields}


def layer(**fields: Any) -> dict[str, Any]:
    return {"optimizer": "delta", "layer": fields}


def squares(**fields: Any) -> dict[str, Any]:
    return {"regressor": {"kind": "least_squares", **fields}, "optimizer": "cg"}


MLP = {"regressor": "mlp", "optimizer": "delta"}
HUBER = {"optimizer": {"kind": "sgd", "step": "sigmoid"}, "objective": "huber"}

# declaration, then what its refusal must contain
UNKNOWN = {
    "regressor": ({"regressor": "liner", "optimizer": "delta"}, "regressor.kind='liner'", "'least_squares', 'linear', 'mlp'",
        "Did you mean 'linear'?"),
    "objective": ({"objective": "hubert", "optimizer": "sgd"}, "objective.kind='hubert'", "['dot', 'huber', 'l2', 'lp']", "Did you mean 'huber'?"),
    "optimizer": ({"optimizer": "detla"}, "optimizer.kind='detla'", "'delta', 'implicit', 'momentum', 'multistep'", "Did you mean 'delta'?"),
    "gate": (gate(kind="vektor"), "gate.kind='vektor'", "['fixed', 'none', 'scalar', 'vector', 'weight_norm']", "Did you mean 'vector'?"),
    "mirror": (opt(mirror="nrom"), "optimizer.mirror.kind='nrom'", "['none', 'norm', 'softmax']", "Did you mean 'norm'?"),
    "step rule": (opt(step_rule="nlm"), "optimizer.step_rule.kind='nlm'", "['implicit', 'nlms', 'plain']", "Did you mean 'nlms'?"),
    "nothing near": ({"optimizer": "backpropagation"}, "optimizer.kind='backpropagation' is not known; choose from"),
    "stage": (layer(q=["conv", "con"]), "layer.q[1].kind='con'", "Did you mean 'conv'?"),
    "stage of qk": (layer(qk=["sillu"]), "layer.q[0].kind='sillu'", "Did you mean 'silu'?"),
    "map": (opt(step="sigmod"), "optimizer.step.map.kind='sigmod'", "'sigmoid', 'silu', 'softplus'", "Did you mean 'sigmoid'?"),
    "map of a gate": (gate(kind="scalar", map="mambo"), "gate.map.kind='mambo'", "Did you mean 'mamba'?"),
    "preset": ("gated_deltanett", "spec='gated_deltanett'", "'gated_deltanet', 'gated_deltaproduct'", "Did you mean 'gated_deltanet'?"),
    "base": ({"base": "kda2"}, "base='kda2'", "Did you mean 'kda'?"),
    "key": ({"optimiser": "delta"}, "optimiser='delta'", "'name', 'objective', 'optimizer'", "Did you mean 'optimizer'?"),
    "field": (opt(stepz=3), "optimizer.stepz=3: Delta has no such field", "'step', 'step_rule', 'steps'", "Did you mean 'step"),
    "field of a solver": ({**squares(), "optimizer": {"kind": "cg", "iteration": 3}}, "optimizer.iteration=3", "Did you mean 'iterations'?"),
    "field of a signal": (opt(step={"bais": 1}), "optimizer.step.bais=1: Signal has no such field", "Did you mean 'bias'?"),
    "field of a gate": (gate(kind="scalar", biass=1), "gate.biass=1: Scalar has no such field", "'order'", "Did you mean 'bias'?"),
    "field of a map": (gate(kind="scalar", map={"kind": "mamba", "a": 1}), "gate.map.a=1: Mamba has no such field", "['A', 'dt']"),
    "field of read": ({"optimizer": "delta", "read": {"normaliser": "sum"}}, "read.normaliser='sum': Read has no", "Did you mean 'normalizer'?"),
    "field of what has none": ({**squares(), "optimizer": {"kind": "cholesky", "steps": 2}}, "optimizer.steps=2: Cholesky has no such field; it has none"),
    "field of layer": (layer(n_head=2), "layer.n_head=2: Layer has no such field", "Did you mean 'n_heads'?"),
    "field of a stage": (layer(q=[{"kind": "conv", "kernel": 4}]), "layer.q[0].kernel=4: Conv has no such field", "'kernel_size'"),
    "choice": (opt(pairs="share"), "optimizer.pairs='share': expected one of ['separate', 'shared']", "Did you mean 'shared'?"),
    "choice of words or numbers": (opt(mini_batch="sequences"), "optimizer.mini_batch='sequences'", "a whole number", "Did you mean 'sequence'"),
    "choice of a gate": (gate(kind="fixed", decay="lightening"), "gate.decay='lightening'", "'learned', 'lightning', 'retnet'", "or expected a list"),
    "read": ({"optimizer": "delta", "read": "befor"}, "read.at='befor': expected one of ['after', 'before']", "Did you mean 'before'?"),
    "tie": (opt(step={"tie": "gate.dx"}), "optimizer.step.tie='gate.dx': expected one of ['gate.dt']"),
    "file": ("nowhere/layer.yaml", "spec='nowhere/layer.yaml': there is no file"),
}  # fmt: skip

TYPES = {
    "string for int": (opt(steps="3"), "optimizer.steps='3': expected a whole number, got str"),
    "float for int": (opt(steps=3.0), "optimizer.steps=3.0: expected a whole number, got float"),
    "bool for int": (opt(steps=True), "optimizer.steps=True: expected a whole number, got bool"),
    "float for int or word": (opt(mini_batch=2.5), "optimizer.mini_batch=2.5: expected a whole number, got float"),
    "string for number": ({"regressor": {"kind": "mlp", "expansion": "4"}, "optimizer": "delta"},
        "regressor.expansion='4': expected a number, got str"),
    "bool for number": (layer(expand_k=True), "layer.expand_k=True: expected a number, got bool"),
    "nan": ({"optimizer": "delta", "read": {"scale": NAN}}, "read.scale=nan: expected a finite number"),
    "number for bool": ({"optimizer": {"kind": "momentum", "nesterov": 1}}, "optimizer.nesterov=1: expected true or false, got int"),
    "string for bool": (opt(accumulate="yes"), "optimizer.accumulate='yes': expected true or false, got str"),
    "bool for a signal": (opt(step=True), "optimizer.step=True: a signal is a number, a map name", "'sigmoid'"),
    "nan for a signal": (opt(step=NAN), "optimizer.step=nan: expected a number"),
    "nothing for a signal": (opt(step=None), "optimizer.step=None: a signal is a number"),
    "list for a signal": (opt(step=[1, 2]), "optimizer.step=[1, 2]: a signal is a number, a map name"),
    "list too long": (opt(step={"bias": [1, 2, 3]}), "optimizer.step.bias=[1, 2, 3]", "expected 2 entries, got 3"),
    "list too short": (gate(kind="scalar", map={"kind": "mamba", "A": [1]}), "gate.map.A=[1]: expected 2 entries, got 1"),
    "word in a list": (gate(kind="fixed", decay=[-1, "a"]), "gate.decay[1]='a': expected a number, got str"),
    "word for a list": (layer(q="conv"), "layer.q='conv': expected a list"),
    "number for a kind": ({"optimizer": 3}, "optimizer=3: expected a kind (one of ['adam'", "or a mapping with `kind`"),
    "false for a kind": ({"optimizer": "delta", "gate": False}, "gate=False: expected a kind"),
    "kind is no word": ({"optimizer": {"kind": 3}}, "optimizer.kind=3 is not a word; choose from ['adam'"),
    "no kind": (gate(map="logsigmoid"), "gate has no `kind`; choose from ['fixed', 'none', 'scalar', 'vector', 'weight_norm']"),
    "list for a layer": ({"optimizer": "delta", "layer": []}, "layer=[]: expected a mapping with ['expand_k', 'expand_v'"),
    "number for a spec": (3, "spec=3: expected a preset name, a YAML path, a mapping or a Spec, got int"),
    "constant and more": (opt(step={"value": 1.0, "bias": 0.0}), "optimizer.step: a constant (value=1.0) takes no other fields, got ['bias']"),
    "class of another slot": ({"optimizer": Scalar()}, "Scalar is not a registered optimizer"),
    "class of a base": ({"optimizer": "delta", "objective": Objective()}, "Objective is not a registered objective; choose from ['dot'"),
    "no optimizer": ({"regressor": "linear"}, "optimizer is missing; choose from ['adam'"),
}  # fmt: skip

VALUES = {
    "steps": (opt(steps=0), "optimizer.steps=0: expected at least 1"),
    "mini_batch": (opt(mini_batch=0), "optimizer.mini_batch=0: expected at least 1"),
    "iterations": ({**squares(), "optimizer": {"kind": "cg", "iterations": 0}}, "optimizer.iterations=0: expected at least 1"),
    "tolerance": ({**squares(), "optimizer": {"kind": "cg", "tolerance": -1}}, "optimizer.tolerance=-1.0: expected >= 0"),
    "beta": ({"optimizer": {"kind": "adam", "beta1": 1}}, "optimizer.beta1=1.0: expected 0 <= beta1 < 1"),
    "adam eps": ({"optimizer": {"kind": "adam", "eps": 0}}, "optimizer.eps=0.0: expected > 0"),
    "muon eps": ({"optimizer": {"kind": "muon", "eps": 0}}, "optimizer.eps=0.0: expected > 0"),
    "nlms eps": (opt(step_rule={"kind": "nlms", "eps": 0}), "optimizer.step_rule", "eps=0.0: expected eps > 0"),
    "depth": ({"regressor": {"kind": "mlp", "depth": 0}, "optimizer": "delta"}, "regressor.depth=0: expected at least 1"),
    "glu depth": ({"regressor": {"kind": "mlp", "depth": 3, "glu": True}, "optimizer": "delta"}, "regressor.glu=true has depth 2", "got depth=3"),
    "expansion": ({"regressor": {"kind": "mlp", "expansion": 0}, "optimizer": "delta"}, "regressor.expansion=0.0: expected > 0"),
    "window": ({"regressor": {"kind": "kernel", "window": 0}}, "regressor.window=0: expected at least 1, or null"),
    "prefix": ({"regressor": {"kind": "kernel", "window": 4, "prefix": -1}}, "regressor.prefix=-1: expected at least 0"),
    "prefix alone": ({"regressor": {"kind": "kernel", "prefix": 4}}, "regressor.prefix=4 is what a window does not pass"),
    "ridge": (squares(ridge=0.1), "regressor.ridge=0.1, ridge_floor=0.25: expected 0 <= ridge_floor < ridge"),
    "weight": (squares(weight=-1), "regressor.weight=-1.0: expected >= 0"),
    "p": ({"objective": {"kind": "lp", "p": 1}, "optimizer": "sgd"}, "objective.p=1.0: expected 1 < p < inf"),
    "smooth": ({"objective": {"kind": "lp", "smooth": -1.0}, "optimizer": "sgd"}, "objective.smooth=-1.0: expected >= 0"),
    "sign scale": ({"objective": {"kind": "lp", "sign_scale": 0}, "optimizer": "sgd"}, "objective.sign_scale=0.0: expected > 0"),
    "mirror q": (opt(mirror={"kind": "norm", "q": 1}), "optimizer.mirror", "q=1.0: expected > 1"),
    "mirror eps": (opt(mirror={"kind": "norm", "eps": 0}), "optimizer.mirror", "eps=0.0: expected > 0"),
    "threshold": ({**HUBER, "objective": {"kind": "huber", "threshold": 0}}, "objective.threshold=0.0: expected > 0"),
    "decays": (gate(kind="fixed", decay=[-1, 0.5]), "gate.decay=[-1.0, 0.5]: natural log decays must be <= 0"),
    "rank": (opt(step={"rank": 0}), "optimizer.step.rank=0: expected at least 1, `head_dim` or null"),
    "softcap": (opt(step={"softcap": 0}), "optimizer.step.softcap=0.0: expected > 0 or null"),
    "activation without rank": (opt(step={"rank_activation": "tanh"}),
        "optimizer.step.rank_activation='tanh' acts inside a bottleneck: it needs rank"),
    "mamba A": (gate(kind="scalar", map={"kind": "mamba", "A": [2, 1]}), "gate.map", "A=[2.0, 1.0]: expected [low, high]"),
    "mamba dt": (gate(kind="scalar", map={"kind": "mamba", "dt": [0, 1]}), "gate.map", "dt=[0.0, 1.0]: expected [low, high] with 0 < low"),
    "sizes": (layer(n_heads=0), "layer.n_heads=0: expected > 0"),
    "key heads": (layer(n_heads=4, n_key_heads=3), "layer.n_key_heads=3 does not divide layer.n_heads=4"),
    "stage": (layer(q=[{"kind": "conv", "kernel_size": 0}]), "layer.q[0]", "kernel_size=0: expected at least 1"),
}  # fmt: skip

SEPARATE = opt(write_key="separate")
POSITION = opt(position="mean", mini_batch=4)
SEPARATE_NEEDS = "optimizer.write_key='separate' splits the gradient", "it needs regressor linear, objective l2 and a linear optimizer"
POSITION_NEEDS = "optimizer.position='mean' scales what was gathered", "it needs sgd or delta, no gate, no accumulate and read=after"
CLOSED_FORM = "needs regressor linear and objective dot or l2 (its step has a closed form only there)"
KERNEL = {"regressor": "kernel"}
MEANINGLESS = {
    "sgd on mlp without objective": (
        {"regressor": "mlp", "optimizer": "sgd"}, "optimizer=sgd on regressor='mlp'", "set objective to one of ['dot', 'huber', 'l2', 'lp']"
    ),
    "sgd on least squares": (
        {"regressor": "least_squares", "optimizer": "sgd"}, "is solved, not descended", "one of ['cg', 'cholesky', 'rls']", "'sgd'"
    ),
    "nlms on least squares": ({"regressor": "least_squares", "optimizer": "nlms"}, "is solved, not descended", "got 'delta' with step_rule 'nlms'"),
    "delta with dot": ({"optimizer": "delta", "objective": "dot"}, "optimizer=delta is sgd on objective l2, got objective='dot'", "optimizer: sgd"),
    "delta with huber": ({"optimizer": "delta", "objective": "huber"}, "got objective='huber'", "set objective: l2"),
    "accumulate with read after": (opt(accumulate=True, mini_batch=4), "optimizer.accumulate=true needs read=before", "the rest of its mini-batch"),
    "accumulate with mini_batch 1": ({**opt(accumulate=True), "read": "before"}, "optimizer.accumulate=true needs mini_batch > 1"),
    "position with mini_batch 1": (opt(position="mean"), "optimizer.position='mean' needs mini_batch to be a number > 1, got 1"),
    "position with a sequence": (opt(position="learned", mini_batch="sequence"), "optimizer.position='learned'", "a number > 1, got 'sequence'"),
    "position with momentum": ({"optimizer": {**POSITION["optimizer"], "kind": "momentum"}}, *POSITION_NEEDS),
    "position with a gate": ({**POSITION, "gate": "scalar"}, *POSITION_NEEDS),
    "position with read before": ({**POSITION, "read": "before"}, *POSITION_NEEDS),
    "position with accumulate": ({**opt(position="mean", mini_batch=4, accumulate=True), "read": "before"}, *POSITION_NEEDS),
    "separate keys on mlp": ({**SEPARATE, "regressor": "mlp"}, *SEPARATE_NEEDS),
    "separate keys on dot": ({"optimizer": {"kind": "sgd", "write_key": "separate"}}, *SEPARATE_NEEDS),
    "separate keys with adam": ({"optimizer": {"kind": "adam", "write_key": "separate"}}, *SEPARATE_NEEDS),
    "separate keys, implicit": (opt(write_key="separate", step_rule="implicit"), "with step_rule='implicit' has no closed form", "plain or nlms"),
    "separate keys, accumulate": (
        {**opt(write_key="separate", accumulate=True, mini_batch=4), "read": "before"}, "optimizer.write_key='separate' with accumulate",
    ),
    "write_key stream": (layer(write_key=[]), "layer.write_key is a stream of optimizer.write_key='separate', which is not declared"),
    "nlms on mlp": ({**MLP, "optimizer": "nlms"}, "optimizer.step_rule='nlms'", CLOSED_FORM, "got 'mlp' and 'l2'"),
    "implicit on mlp": ({**MLP, "optimizer": "implicit"}, "optimizer.step_rule='implicit'", CLOSED_FORM),
    "nlms on huber": ({**HUBER, "optimizer": {"kind": "sgd", "step_rule": "nlms"}}, "optimizer.step_rule='nlms'", "got 'linear' and 'huber'"),
    "implicit on lp": ({"objective": "lp", "optimizer": {"kind": "sgd", "step_rule": "implicit"}}, "optimizer.step_rule='implicit'", "'lp'"),
    "threshold of a length per value": ({**HUBER, "objective": {"kind": "huber", "over": "length", "threshold": {"per": "value"}}},
        "objective.threshold.per='value': over='length' compares the length of the whole error; use per head"),
    "step rule of a mirror": (opt(step_rule="nlms", mirror="norm"), "optimizer.step_rule='nlms'", "mirror='norm' changes; use step_rule plain"),
    "mirror of a normaliser": ({"optimizer": {"kind": "sgd", "mirror": "softmax"}, "read": {"normalizer": "sum"}}, "mirror='softmax'",
        "use read.normalizer none"),
    "two step rules": (opt(kind="implicit", step_rule="nlms"), "optimizer: kind 'implicit' means step_rule 'implicit', got step_rule='nlms'"),
    "per key on mlp": ({**MLP, **opt(step={"per": "key"})}, "optimizer.step.per='key' needs regressor linear: 'mlp' has no single key axis"),
    "per value on mlp": ({**MLP, **opt(step={"per": "value"})}, "optimizer.step.per='value' needs regressor linear"),
    "loss per tensor": ({**HUBER, "objective": {"kind": "huber", "threshold": {"per": "tensor"}}}, "objective.threshold.per='tensor'",
        "['head', 'value']"),
    "weight norm of statistics": ({"regressor": "least_squares", "optimizer": "cg", "gate": "weight_norm"}, "gate='weight_norm'", "regressor='least_squares'"),
    "weight norm of a normaliser": ({"optimizer": "sgd", "gate": "weight_norm", "read": {"normalizer": "sum"}}, "read.normalizer none"),
    "weight norm without eps": (gate(kind="weight_norm", eps=0.0), "gate.eps=0.0: expected > 0"),
    "muon per value": ({"optimizer": {"kind": "muon", "weight": {"per": "value"}}}, "optimizer.weight.per='value': muon turns whole matrices"),
    "threshold per key": ({**HUBER, "objective": {"kind": "huber", "threshold": {"per": "key"}}}, "objective.threshold.per='key'",
        "['head', 'value']"),
    "weight per key": (squares(weight={"per": "key"}), "regressor.weight.per='key': one weight per pair and head"),
    "kernel with optimizer": ({**KERNEL, "optimizer": "delta"}, "regressor=kernel keeps every pair and has no optimizer, got 'delta'"),
    "kernel with gate": ({**KERNEL, "gate": "scalar"}, "regressor=kernel forgets by its window only, got gate='scalar'"),
    "kernel with objective": ({**KERNEL, "objective": "l2"}, "regressor=kernel has no inner objective, got 'l2'"),
    "kernel read before": ({**KERNEL, "read": "before"}, "regressor=kernel reads after the token"),
    "kernel normalised": ({**KERNEL, "read": {"normalizer": "sum"}}, "regressor=kernel", "read.normalizer=none"),
    "least squares with delta": ({**squares(), "optimizer": "delta"}, "regressor=least_squares is solved", "['cg', 'cholesky', 'rls'], got 'delta'"),
    "least squares with huber": ({**squares(), "objective": "huber"}, "regressor=least_squares has objective l2 (sum) by definition"),
    "least squares, coupled": ({**squares(), "gate": {"kind": "scalar", "order": "coupled"}}, "gate.order='coupled' speaks of a gradient"),
    "least squares normalised": ({**squares(), "read": {"normalizer": "sum"}}, "read.normalizer='sum'", "got 'least_squares'"),
    "rls with gate and constant ridge": (
        {**squares(), "optimizer": "rls", "gate": "scalar"},
        "optimizer=rls with a gate forgets its ridge too", "regressor.ridge_decays=true", "cg or cholesky"
    ),
    "solver on linear": ({"optimizer": "rls"}, "optimizer='rls' solves the normal equations of regressor least_squares, got regressor='linear'"),
    "normalizer on mlp": ({**MLP, "read": {"normalizer": "max1"}}, "read.normalizer='max1'", "needs regressor linear, got 'mlp'"),
    "gate that grows": (gate(kind="scalar", map="sigmoid"), "gate.map='sigmoid' with scale=1.0 gives positive log decays", "['logsigmoid', 'mamba']"),
    "vector gate that grows": (gate(kind="vector", map="softplus"), "gate.map='softplus'", "a negative scale"),
    "mamba turned round": (gate(kind="scalar", scale=-1), "gate.map='mamba' with scale=-1.0"),
    "constant gate that grows": (gate(kind="scalar", value=0.1), "gate=0.1: a gate's value is a natural log decay, <= 0"),
    "scalar gate per key": (gate(kind="scalar", per="key"), "gate.per='key': a scalar gate is per head; use kind vector"),
    "vector gate per head": (gate(kind="vector", per="head"), "gate.per='head': a vector gate is per key; use kind scalar"),
    "output stage in a stream": (layer(q=["gate"]), "layer.q: stage 'gate' belongs to `output` only"),
    "skip in v": (layer(v=["conv", "skip"]), "layer.v: stage 'skip' belongs to `output` only"),
    "bonus in write_key": ({**SEPARATE, "layer": {"write_key": ["bonus"]}}, "layer.write_key: stage 'bonus'"),
    "qk and q": (layer(qk=[], q=[]), "layer.qk sets q and k, but layer.q is given too"),
    "constant output gate": (layer(output=[{"kind": "gate", "value": 1}]), "layer.output[0]", "an output gate is projected"),
    "output gate per key": (layer(output=["rms", {"kind": "gate", "per": "key"}]), "layer.output[1]",
        "gate.per='key': expected one of ['head', 'value']"),
    "tie to no gate": (opt(step={"tie": "gate.dt"}), "step.tie='gate.dt' is the time step of a gate with map mamba; there is none"),
    "tie to another map": ({**opt(step={"tie": "gate.dt"}), "gate": {"kind": "scalar", "map": "logsigmoid"}}, "step.tie='gate.dt'", "there is none"),
    "tie across widths": ({**opt(step={"tie": "gate.dt"}), "gate": "vector"}, "the gate is per key, step per head; they must agree"),
    "tie and a projection": ({**opt(step={"tie": "gate.dt", "rank": 4, "bias": 0}), "gate": "scalar"}, "optimizer.step.tie='gate.dt'",
        "['rank', 'bias']"),
}  # fmt: skip

TABLES = {"unknown": UNKNOWN, "types": TYPES, "values": VALUES, "meaningless": MEANINGLESS}


@pytest.fixture(autouse=True)
def own_kinds(monkeypatch):
    """Only the kinds that ttr brings are choices, whatever other tests registered; a test's own are forgotten after it."""
    for table in (registry.REGRESSORS, registry.OBJECTIVES, registry.OPTIMIZERS, registry.GATES, registry.SIGNAL_MAPS):
        monkeypatch.setattr(table, "_classes", {k: cls for k, cls in table._classes.items() if cls.__module__.startswith("ttr.")})


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, rows in TABLES.items() for name in rows])
def test_refusal(table, name):
    declaration, *expected = TABLES[table][name]
    with pytest.raises(ttr.SpecError) as refused:
        ttr.spec(declaration)
    for part in expected:
        assert part in str(refused.value)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(("overrides", "expected"), [
    ({"optimizer.stepz": 1}, "optimizer.stepz=1: Delta has no such field"),
    ({"optimizer.step.bais": 1}, "optimizer.step.bais=1"),
    ({"optimizer.steps": "2"}, "optimizer.steps='2': expected a whole number"),
    ({"optimiser.steps": 2}, "optimiser={'steps': 2}: a declaration has no such key"),
    ({"layer.q.conv": 1}, "layer.q={'conv': 1}: expected a list"),
    ({"gate.map.B": 1}, "gate.map.B=1: Mamba has no such field"),
    ({"read.at": "later"}, "read.at='later': expected one of ['after', 'before']"),
])  # fmt: skip
def test_overrides_are_refused_by_the_same_rules(overrides, expected):
    for source in ("kda", ttr.spec("kda"), {"base": "kda"}):
        with pytest.raises(ttr.SpecError) as refused:
            ttr.spec(source, **overrides)
        assert expected in str(refused.value)


def test_files_are_refused_with_their_name(tmp_path):
    path = tmp_path / "layer.yaml"
    for text, expected in {
        "optimizer: [": "is not a YAML mapping",
        "- delta": "expected a preset name, a YAML path, a mapping or a Spec, got list",
        "optimizer: ${nothing}": "is not a YAML mapping",
        "base: nowhere.yaml": "base='nowhere.yaml': there is no file",
        "optimizer: {kind: delta, step: {map: sigmoidd}}": "optimizer.step.map.kind='sigmoidd'",
    }.items():
        path.write_text(text)
        with pytest.raises(ttr.SpecError) as refused:
            ttr.spec(path)
        assert expected in str(refused.value)


# Pieces that say what is not so


def clipped(z, g, s):
    return (z[0] - s.step * g.clamp(-100, 100),)


def offset(z, g, s):
    return (z[0] - s.step * g + 1e-3,)


def signed(z, g, s):
    return (z[0] - s.step * g.sign(),)


def squared(z, g, s):
    return (z[0] - s.step * g * g,)


def centred(z, g, s):
    return (z[0] - s.step * (g - g.mean()),)


def rolled(z, g, s):
    return (z[0].roll(1, -1) - s.step * g,)


@pytest.mark.parametrize(("update", "reason"), [
    (clipped, "update[0] is not linear"), (offset, "update[0] is not linear"), (signed, "update[0] is not linear"),
    (squared, "update[0] is not linear"), (centred, "update[0] is not elementwise"), (rolled, "update[0] is not elementwise"),
])  # fmt: skip
def test_a_false_linear_is_caught(update, reason):
    @ttr.optimizer("liar")
    @dataclass(frozen=True, kw_only=True)
    class Liar(Delta):
        def update(self, z, g, s):
            return update(z, g, s)

    with pytest.raises(ttr.SpecError, match="'liar' says linear=True") as refused:
        ttr.spec({"optimizer": "liar"})
    assert reason in str(refused.value) and "set linear=False" in str(refused.value)

    @ttr.optimizer("honest")
    @dataclass(frozen=True, kw_only=True)
    class Honest(Liar):
        linear = False

    assert ttr.select_path({"optimizer": "honest"})[0] == "definition"


@pytest.mark.parametrize("function", ["point", "read"])
def test_a_false_linear_is_caught_wherever_it_stands(function):
    @ttr.optimizer("liar")
    @dataclass(frozen=True, kw_only=True)
    class Liar(Delta):
        pass

    setattr(Liar, function, lambda self, z, s: z[0].tanh())
    with pytest.raises(ttr.SpecError, match=f"'liar' says linear=True, but its {function} is not linear"):
        ttr.spec({"optimizer": "liar"})


@pytest.mark.parametrize("loss", [
    lambda p, v: (p - v).abs().clamp(max=500).square().sum(), lambda p, v: (p - v).pow(4).sum(), lambda p, v: 0.5 * (p - v).sum().square(),
    lambda p, v: (p - v + 1).square().sum(), lambda p, v: (p.cumsum(0) - v).square().sum(),
])  # fmt: skip
def test_a_false_quadratic_is_caught(loss):
    @ttr.objective("liar")
    @dataclass(frozen=True, kw_only=True)
    class Liar(Objective):
        quadratic = True

        def loss(self, prediction, target, s):
            return loss(prediction, target)

    with pytest.raises(ttr.SpecError, match="'liar' says quadratic=True, but its gradient is not"):
        ttr.spec({"objective": "liar", "optimizer": "sgd"})


def test_a_quadratic_objective_has_no_signals():
    @ttr.objective("weighted")
    @dataclass(frozen=True, kw_only=True)
    class Weighted(L2):
        importance: Signal = signal("sigmoid")

    with pytest.raises(ttr.SpecError, match=r"'weighted' says quadratic=True, but has the signals \['importance'\]"):
        ttr.spec({"objective": "weighted", "optimizer": "sgd"})


def test_a_signal_is_declared_once():
    @ttr.gate("stepping")
    @dataclass(frozen=True, kw_only=True)
    class Stepping(Gate):
        step: Signal = signal("logsigmoid")

    with pytest.raises(ttr.SpecError, match="optimizer 'delta' and gate 'stepping' both declare the signal 'step'; rename it"):
        ttr.spec({"optimizer": "delta", "gate": "stepping"})


def test_a_signal_is_no_argument_of_regress():
    @ttr.optimizer("scaling")
    @dataclass(frozen=True, kw_only=True)
    class Scaling(Delta):
        scale: Signal = signal("sigmoid")

    with pytest.raises(
        ttr.SpecError, match=r"optimizer 'scaling' declares the signal 'scale', but ttr.regress has an argument of that name"
    ):
        ttr.spec({"optimizer": "scaling"})


def test_replacing_a_piece_checks_again():
    with pytest.raises(ttr.SpecError, match="delta is sgd on objective l2"):
        dataclasses.replace(ttr.spec("deltanet"), objective=Dot())
