"""`ttr.explain`: what it prints is what runs, for every preset and for pieces it has never seen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import ttr
from ttr.choice import targets
from ttr.explanation import Explanation, explain
from ttr.explanation.coefficients import probe
from ttr.explanation.sources import FRAMEWORK, PIECES, PRESETS, entries, short
from ttr.explanation.symbols import NotSymbolic, Symbol
from ttr.inner_optim import Optimizer
from ttr.registry import gate, optimizer
from ttr.testing import call, random_inputs

SECTIONS = ("Recurrence", "Among the published mechanisms", "Path", "Costs of", "Sources", "@article{")


@pytest.mark.parametrize("name", ttr.presets())
def test_every_preset_explains(name):
    spec = ttr.spec(name)
    for e in (explain(name), explain(spec, d_model=256, T=100)):
        assert isinstance(e, Explanation) and e.name == name and e.spec is spec
        assert e.same_as[0] == name and e.other_signals == () and name in e.place
        assert (e.path, e.reason) == ttr.select_path(name, length=e.T)
        assert set(e.sources) >= {*PRESETS[name], FRAMEWORK}
        assert all(entries()[key] in e.bibtex for key in e.sources)
        assert e.state_bytes > 0 and e.flops_per_token > 0 and e.bytes_per_token > e.state_bytes
        assert {note.name for note in e.signals} >= set(spec.signals())
        page = str(e)
        assert repr(e) == page and all(part in page for part in SECTIONS)
        assert all(line in page for line in e.recurrence if len(line) < 100)


@pytest.mark.parametrize("name", ttr.presets())
def test_state_bytes_are_those_of_a_real_state(name):
    e = explain(name, d_model=64, T=9)
    s = e.sizes
    case = random_inputs(name, T=9, B=1, H=s.key_heads, Hv=s.heads, dk=s.dk, dv=s.dv, dtype=torch.float32, state=False, extreme=False)
    _, state = call(case)
    assert e.state_bytes == state.nbytes == sum(e.costs.state.values())


def test_the_cache_of_softmax_grows_with_the_length_and_stops_at_the_window():
    short_, long = explain("softmax", T=100), explain("softmax", T=1000)
    assert long.state_bytes - short_.state_bytes == 900 * long.costs.bytes_per_pair
    assert explain("softmax_window", T=1000).state_bytes == explain("softmax_window", T=10_000).state_bytes
    assert explain("kda", T=100).state_bytes == explain("kda", T=10_000).state_bytes


def test_a_mixer_is_explained_at_its_own_sizes():
    mixer = ttr.Mixer(64, "gated_deltanet", n_heads=2, path="recurrent")
    e = explain(mixer)
    assert (e.sizes.d_model, e.sizes.heads, e.sizes.dk, e.sizes.dv) == (64, 2, mixer.dk, mixer.dv)
    assert e.path == "recurrent" and e.state_bytes == mixer.init_state(1).memory.nbytes
    assert e.learned == {name: tuple(p.shape) for name, p in mixer.params.items()}


def test_sizes_follow_the_feature_map():
    spec = ttr.spec("linear_attention_unnormalised", **{"layer.q": ["dpfp"], "layer.k": ["dpfp"]})
    mixer = ttr.Mixer(64, spec)
    assert explain(spec, d_model=64).sizes.dk == mixer.dk > mixer.sizes.key_width


COEFFICIENTS = {
    "sgd": ("sgd", "none", (("1",),), ("-1",), ("1",), ("1",)),
    "delta": ("delta", "none", (("1",),), ("-β",), ("1",), ("1",)),
    "gated": ("delta", "scalar", (("α",),), ("-β",), ("α",), ("1",)),
    "coupled": ("delta", {"kind": "vector", "order": "coupled"}, (("α",),), ("-β",), ("1",), ("1",)),
    "implicit": ("implicit", "none", (("1",),), ("-β′",), ("1",), ("1",)),
    "momentum": ("momentum", "scalar", (("α", "η"), ("0", "η")), ("-β", "-β"), ("α", "0"), ("1", "0")),
    "nesterov": ({"kind": "momentum", "nesterov": True}, "none", (("1", "η"), ("0", "η")), ("-β", "-β"), ("1", "η"), ("1", "0")),
    "constant": ({"kind": "momentum", "momentum": 0.9}, "none", (("1", "0.9"), ("0", "0.9")), ("-β", "-β"), ("1", "0"), ("1", "0")),
    "averaged": ("averaged", "none", (("1", "0"), ("average", "1 - average")), ("-β", "-β average"), ("1", "0"), ("0", "1")),
}  # fmt: skip


@pytest.mark.parametrize("case", COEFFICIENTS)
def test_coefficients_in_symbols(case):
    rule, forget, A, b, c, read = COEFFICIENTS[case]
    found = explain({"optimizer": rule, "gate": forget}).coefficients
    assert found is not None and found.symbolic
    assert (found.A, found.b, found.c, found.read) == (A, b, c, read)


RECURRENCES = {
    "kda": ("eₜ = (Diag(αₜ) Wₜ₋₁)ᵀ kₜ - vₜ", "Wₜ = Diag(αₜ) Wₜ₋₁ - βₜ kₜ eₜᵀ", "oₜ = Wₜᵀ qₜ / √dk"),
    "mamba2": ("Wₜ = αₜ Wₜ₋₁ + βₜ kₜ vₜᵀ", "oₜ = Wₜᵀ qₜ"),
    "retnet": ("Wₜ = α Wₜ₋₁ + kₜ vₜᵀ", "oₜ = Wₜᵀ qₜ / √dk"),
    "momentum_deltanet": ("eₜ = Wₜ₋₁ᵀ kₜ - vₜ", "Mₜ = ηₜ Mₜ₋₁ - βₜ kₜ eₜᵀ", "Wₜ = Wₜ₋₁ + Mₜ", "oₜ = Wₜᵀ qₜ / √dk"),
    "rwkv7": ("eₜ = Wₜ₋₁ᵀ kₜ", "Wₜ = Diag(αₜ) Wₜ₋₁ + k̃ₜ vₜᵀ - (βₜ ⊙ kₜ) eₜᵀ", "oₜ = Wₜᵀ qₜ"),
    "longhorn": ("β′ₜ = βₜ / (1 + Σ(βₜ kₜ²))", "eₜ = Wₜ₋₁ᵀ kₜ - vₜ", "Wₜ = Wₜ₋₁ - kₜ (β′ₜ ⊙ eₜ)ᵀ", "oₜ = Wₜᵀ qₜ"),
    "gated_deltaproduct": (
        "for j = 1, …, 2:      (W₀ = Wₜ₋₁, Wₜ = W₂; α₁ = αₜ, then αⱼ = 1)",
        "  eⱼ = αⱼ Wⱼ₋₁ᵀ kⱼ - vⱼ", "  Wⱼ = αⱼ Wⱼ₋₁ - βⱼ kⱼ eⱼᵀ", "oₜ = Wₜᵀ qₜ / √dk",
    ),
    "titans": (
        "f(x) = x + norm_weight LN(gelu(x W1) W2) + norm_bias",
        "ℓ(f, v) = 0.5 mean((f - v)²)",
        "gₜ = ∂ℓ(f(kₜ; W), vₜ)/∂W at W = W⋆      (⋆: as the mini-batch of 64 tokens began)",
        "Mₜ = ηₜ Mₜ₋₁ - βₜ gₜ", "Wₜ = αₜ Wₜ₋₁ + Mₜ", "oₜ = f(qₜ; W = Wₜ)",
    ),
    "softmax_window": ("aₜᵢ = softmaxᵢ(qₜᵀ kᵢ / √dk),  t - 512 < i ≤ t", "oₜ = Σᵢ aₜᵢ vᵢ"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrence(name):
    assert explain(name).recurrence == RECURRENCES[name]


@pytest.mark.parametrize("name", ["linear_attention", "mlstm", "mesanet", "ttt_linear"])
def test_the_readout_is_part_of_the_recurrence(name):
    words = {
        "linear_attention": "+ 1e-06",
        "mlstm": "max(|",
        "mesanet": "30 steps of conjugate gradients",
        "ttt_linear": "max(0, 1/i + δᵢ)",
    }
    assert words[name] in "\n".join(explain(name).recurrence)


@optimizer("explain_test_rule")
@dataclass(frozen=True, kw_only=True)
class Rule(Optimizer):
    """Leaky weights with a fast and a slow copy; no such thing is published."""

    linear: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("slow",)
    step: ttr.Signal = ttr.signal("sigmoid")
    leak: ttr.Signal = ttr.signal("sigmoid")

    def update(self, z, g, s):
        fast, slow = z
        fast = torch.exp(-s.leak) * fast - s.step.sqrt() * g
        return fast, torch.lerp(slow, fast, torch.tensor(0.5))

    def read(self, z, s):
        return z[0] + s.leak * z[1]

    def bibtex(self):
        return "@misc{nobody,\n  title = {Nothing}\n}"


@gate("explain_test_gate")
@dataclass(frozen=True, kw_only=True)
class Halving(ttr.Gate):
    """Every head forgets half of what it has at every token."""

    def log_decay(self, signals, *, n_heads, layer_idx=0, n_layers=1, params):
        return torch.full((n_heads,), 0.5).log()


def test_a_brand_new_optimizer_and_gate_are_explained():
    e = explain({"optimizer": "explain_test_rule", "gate": "explain_test_gate"})
    found = e.coefficients
    assert found is not None and found.symbolic and found.slots == ("weights", "slow")
    assert found.A == (("α exp(-leak)", "0"), ("0.5 α exp(-leak)", "0.5"))
    assert found.b == ("-√(β)", "-0.5 √(β)") and found.c == ("α", "0") and found.read == ("1", "leak")
    assert e.recurrence == (
        "eₜ = α Wₜ₋₁ᵀ kₜ - vₜ",
        "Wₜ = α exp(-leakₜ) Wₜ₋₁ - √(βₜ) kₜ eₜᵀ",
        "Sₜ = 0.5 Sₜ₋₁ + 0.5 Wₜ",
        "oₜ = (Wₜ + leakₜ Sₜ)ᵀ qₜ / √dk",
    )
    assert e.path == "chunk" and e.target == "LinearRecurrence" and e.same_as == ()
    assert "explain_test_rule instead of" in str(e.neighbours[0]) and "@misc{nobody" in e.bibtex
    assert "Every head forgets half" in str(e)


@optimizer("explain_test_opaque")
@dataclass(frozen=True, kw_only=True)
class Opaque(Optimizer):
    """A rule that branches on a signal, which a symbol cannot."""

    linear: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("other",)
    step: ttr.Signal = ttr.signal("sigmoid")
    mix: ttr.Signal = ttr.signal("sigmoid")

    def update(self, z, g, s):
        w, other = z
        return w - torch.where(s.step > 0.5, 0.5 * s.step, s.step) * g, 2 * other + s.mix * w


def test_numbers_that_no_symbol_explains_say_what_they_depend_on():
    e = explain({"optimizer": "explain_test_opaque", "gate": "scalar"})
    found = e.coefficients
    assert found is not None and not found.symbolic
    assert found.A == (("A₁₁(α)", "0"), ("A₂₁(mix, α)", "2")) and found.b == ("b₁(β)", "0") and found.read == ("1", "0")
    assert "take no symbols" in str(e)


@optimizer("explain_test_false")
@dataclass(frozen=True, kw_only=True)
class NotLinear(Optimizer):
    linear: ClassVar[bool] = True
    step: ttr.Signal = ttr.signal("sigmoid")

    def update(self, z, g, s):
        return (z[0] - s.step * torch.sign(g),)


@optimizer("explain_test_sign")
@dataclass(frozen=True, kw_only=True)
class Sign(NotLinear):
    linear: ClassVar[bool] = False


def test_a_false_promise_of_linearity_is_refused_and_a_nonlinear_rule_prints_its_update():
    with pytest.raises(ttr.SpecError, match="not linear in"):
        explain({"optimizer": "explain_test_false"})
    e = explain({"optimizer": "explain_test_sign", "gate": "scalar"})
    assert e.coefficients is None and e.target == "Definition"
    assert "Wₜ = αₜ Wₜ₋₁ - βₜ sign(gₜ)" in e.recurrence


def test_the_docstring_stands_in_where_an_update_takes_no_symbols():
    e = explain({"optimizer": "adam", "objective": "huber"})
    assert any("adam: g <- weight g" in line for line in e.recurrence)


@pytest.mark.parametrize("order", ["first", "coupled"])
@pytest.mark.parametrize("forget", ["none", "fixed", "scalar", "vector"])
@pytest.mark.parametrize("rule", ["sgd", "delta", "nlms", "implicit", "momentum", "averaged"])
def test_symbols_agree_with_lowering(rule, forget, order):
    """`symbolic` is only true after the symbols gave the numbers that lowering computes with."""
    spec = ttr.spec({"optimizer": {"kind": rule, "steps": 2}, "gate": {"kind": forget, "order": order} if forget != "none" else "none"})
    found = probe(spec)
    assert found is not None and found.symbolic


def test_place_by_mathematics():
    e = explain({"regressor": "linear", "optimizer": "delta", "gate": "scalar"})
    assert e.same_as == ("gated_deltanet",) and e.other_signals == ("log_decay",) and "log_decay" in e.place
    assert [str(n) for n in explain("gated_deltanet", T=9).neighbours][:1] == ["gated_deltaproduct with optimizer.steps 1 instead of 2"]
    other = explain(ttr.spec("gated_deltanet", optimizer="momentum"))
    assert other.same_as == () and other.place.endswith("gated_deltanet with momentum instead of delta")
    assert "gated_deltanet (changed)" in str(other)
    assert explain(ttr.spec("ttt_mlp", optimizer={"kind": "sgd", "mini_batch": 16, "position": "learned"}, objective="lp")).place.endswith(
        "ttt_mlp with objective lp instead of l2, optimizer.step 1 instead of per head"
    )
    fixed = explain({"optimizer": {"kind": "delta", "steps": 2}, "gate": "fixed"})
    assert "α₁ = α, then αⱼ = 1" in fixed.recurrence[0]
    assert explain(ttr.spec("kda", **{"layer.head_dim": 32})).same_as == ("kda",)


FLOPS = {"linear_attention_unnormalised": 4, "gla": 5, "mamba2": 5, "deltanet": 6, "gated_deltanet": 7, "kda": 7, "rwkv7": 9,
         "deltaproduct": 14, "momentum_deltanet": 8}  # fmt: skip


@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_the_linear_family(name):
    """Leading terms of the recurrent form, in units of dk dv."""
    e = explain(name)
    assert round(e.flops_per_token / (e.sizes.dk * e.sizes.dv)) == FLOPS[name]


def test_other_costs():
    assert explain("softmax", T=100).flops_per_token == 2 * 100 * (64 + 64)
    layer, head = explain("kda", d_model=1024), explain("kda")
    assert layer.state_bytes == 8 * head.state_bytes and layer.flops_per_token == 8 * head.flops_per_token
    assert layer.costs.flops_chunk is not None and layer.costs.flops_chunk > layer.flops_per_token
    assert explain("longhorn").costs.flops_chunk is None


def test_targets():
    kinds = {"kda": "LinearRecurrence", "mesanet": "LeastSquares", "softmax": "Kernel"}
    kinds["titans"] = "FrozenGradient" if "dual" in targets(ttr.spec("titans")) else "Definition"
    assert {name: explain(name).target for name in kinds} == kinds
    assert explain({"regressor": "mlp", "optimizer": "momentum"}).target == "Definition"


def test_errors():
    with pytest.raises(ttr.SpecError, match=r"kdaa.*Did you mean 'kda'"):
        explain("kdaa")
    with pytest.raises(ValueError, match="T=0"):
        explain("kda", T=0)
    with pytest.raises(ValueError, match="d_model=0"):
        explain("kda", d_model=0)
    with pytest.raises(ValueError, match=r"is no Mixer; it holds .*mixer"):
        explain(ttr.Block(64, "kda"))
    with pytest.raises(ValueError, match="this mixer has d_model=64"):
        explain(ttr.Mixer(64, "kda"), d_model=32)


def test_every_source_is_a_complete_entry():
    assert set(PRESETS) == set(ttr.presets())
    cited = {key for keys in (*PRESETS.values(), *PIECES.values()) for key in keys} | {FRAMEWORK}
    assert cited == set(entries())
    for key, entry in entries().items():
        assert re.search(r"title = \{.+\}", entry) and re.search(r"year = \{\d{4}\}", entry)
        assert "arXiv:" in short(key) or "https://" in short(key)
        assert entry.count("{") == entry.count("}")


def test_symbols():
    a, b = Symbol.named("a"), Symbol.named("b")
    assert [str(x) for x in (1 - b, b - b, a * (1 - b) + b * a, 2 * a / 4, a / 3, -b)] == ["1 - b", "0", "a", "0.5 a", "1/3 a", "-b"]
    assert str(b / (1 + a * b)) == "b / (1 + a b)" and str((a + b) ** 2) == "(a + b)²" and str(a - a * b) == "a (1 - b)"
    assert str(torch.exp(a) * b) == "b exp(a)" and str(torch.tensor(0.5) * a.square()) == "0.5 a²" and str(0.9**a) == "0.9^a"
    assert str((a @ b).tanh() @ b) == "tanh(a b) b" and str((a + b) @ b) == "(a + b) b" and str(a.square().sum()) == "‖a‖²"
    values = {"a": torch.tensor(0.3), "b": torch.tensor(0.7)}
    x = b.clamp(max=a) / (1 + a.sqrt()) - torch.lerp(a, b, b) ** 2
    expected = 0.3 / (1 + 0.3**0.5) - (0.3 + 0.7 * 0.4) ** 2
    assert abs(float(x.at(values)) - expected) < 1e-6 and x.names == {"a", "b"}
    shape, pair = a.shape[-1], torch.ones(2)
    for refused in (lambda: a > b, lambda: bool(a), lambda: float(a), lambda: torch.stack([a, b]), lambda: shape > 2, lambda: a + pair):
        with pytest.raises(NotSymbolic):
            refused()
