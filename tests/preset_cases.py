"""Of every preset: random arguments, and what its paper makes of them by the transcription. `test_presets` holds ours against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transcriptions as tr
from torch import Tensor

import ttr

B, H, DK, DV = 2, 2, 5, 4
LINEAR = ("definition", "recurrent", "chunk")

Inputs = dict[str, Any]
State = dict[str, Tensor]


class Draw:
    """Random float64 tensors from one seeded stream."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def qkv(self, T: int, dk: int = DK, dv: int = DV, steps: int | None = None) -> Inputs:
        """Queries, keys of unit length and values; with a micro-step axis on the pairs where `steps` is given."""
        pairs = (B, T, H) if steps is None else (B, T, steps, H)
        return {"q": self(B, T, H, dk), "k": F.normalize(self(*pairs, dk), dim=-1), "v": self(*pairs, dv)}

    def rate(self, T: int, *channels: int) -> Tensor:
        return self(B, T, H, *channels).sigmoid()

    def log_decay(self, T: int, *channels: int) -> Tensor:
        return F.logsigmoid(self(B, T, H, *channels) + 1)

    def params(self, spec: ttr.Spec, dk: int, dv: int) -> dict[str, Tensor]:
        """The spec's learned constants, moved off their initial values so that none of them is without effect."""
        initial = spec.init_params(H, dk, dv, dtype=torch.float64, generator=self.generator)
        return {name: value + 0.3 * self(*value.shape) for name, value in initial.items()}


@dataclass(frozen=True)
class Case:
    """What to hand to `ttr.regress`, and what the paper makes of it: its output and state, named as in `ttr.State`.

    `paths` must serve the declaration; others that `testing.targets` finds are held to the same. `seen` makes of our state
    what the paper has.
    """

    preset: str
    draw: Callable[[Draw, ttr.Spec, int], Inputs]
    expect: Callable[[ttr.Spec, Inputs], tuple[Tensor, State]]
    paths: tuple[str, ...] = LINEAR
    overrides: dict[str, Any] = field(default_factory=dict)
    seen: Callable[[State], State] = lambda state: state

    @property
    def spec(self) -> ttr.Spec:
        return ttr.spec(self.preset, **self.overrides)


def matrix(transcription: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[ttr.Spec, Inputs], tuple[Tensor, State]]:
    """The expectation of a mechanism whose transcription takes the inputs as they are and whose state is one matrix."""

    def expect(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
        output, W = transcription(**x)
        return output, {"W": W}

    return expect


# Inputs that differ from q, k, v and per-head signals, and expectations that are more than the transcription


def features(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    x = draw.qkv(T)
    return {"q": F.elu(x["q"]) + 1, "k": F.elu(x["k"]) + 1, "v": x["v"]}


def linear_attention(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    output, state = tr.linear_attention(**x, eps=1e-6)
    return output, {"W": state["W"], "normalizer": state["normaliser"][..., None]}


def mlstm_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return {**draw.qkv(T), "step": (2 * draw(B, T, H)).exp(), "log_decay": draw.log_decay(T)}


def mlstm(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    """The paper's state holds k dk^-½ and is divided by e^m; ours holds k, with dk^-½ on the query."""
    output, state = tr.mlstm(x["q"], x["k"], x["v"], log_input=x["step"].log(), log_forget=x["log_decay"])
    factor = state["m"].exp()[..., None, None] * DK**0.5
    return output, {"W": factor * state["W"], "normalizer": factor * state["normaliser"][..., None]}


def rwkv7_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    signals = {"step": draw.rate(T, DK), "log_decay": draw.log_decay(T, DK)}
    return {**draw.qkv(T), "write_key": draw(B, T, H, DK), **signals}


def deltaproduct_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    n = spec.optimizer.steps
    return {**draw.qkv(T, steps=n), "step": 2 * draw(B, T, n, H).sigmoid()}


def gated_deltaproduct_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return {**deltaproduct_inputs(draw, spec, T), "log_decay": draw.log_decay(T)}


def longhorn_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return {**draw.qkv(T), "k": draw(B, T, H, DK), "step": draw(B, T, H, DV).exp()}


def momentum_deltanet(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    output, state = tr.momentum_deltanet(**x)
    return output, {"W": state["W"], "momentum.W": state["momentum"]}


def ridge(spec: ttr.Spec, x: Inputs) -> Tensor:
    return F.softplus(x["params"]["ridge"]) + spec.regressor.ridge_floor


def mesa(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    output, state = tr.mesa(x["q"], x["k"], x["v"], ridge=ridge(spec, x))
    return output, {"W": state["R"] @ state["G"], "P": state["R"]}


def mesanet(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    signals = {"weight": x["weight"], "log_decay": x["log_decay"]}
    return tr.mesanet(x["q"], x["k"], x["v"], **signals, ridge=ridge(spec, x))


def ttt_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return {**draw.qkv(T, DV, DV), "step": draw.rate(T), "params": draw.params(spec, DV, DV)}


def ttt(transcription: Callable[..., tuple[Tensor, State]]) -> Callable[[ttr.Spec, Inputs], tuple[Tensor, State]]:
    """The published rate has the 1/d that the declaration has in its loss, a mean over channels."""

    def expect(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
        assert spec.objective.reduce == "mean"
        settings = {**x["params"], "mini_batch": spec.optimizer.mini_batch}
        return transcription(x["q"], x["k"], x["v"], rate=x["step"] / DV, **settings)

    return expect


def titans_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    """Decays near 1, as published: weights that shrink raise the slope of their norm, which then amplifies rounding."""
    signals = {"step": draw.rate(T), "momentum": draw.rate(T), "log_decay": F.logsigmoid(draw(B, T, H) + 4)}
    return {**draw.qkv(T, DV, DV), **signals, "params": draw.params(spec, DV, DV)}


def titans(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    """The paper leaves the network and the loss's scale open: the declaration's are used."""
    params = dict(x["params"])
    norm = {name: params.pop(name) for name in ("norm_weight", "norm_bias")}
    output, state = tr.titans(
        x["q"],
        x["k"],
        x["v"],
        step=x["step"] / (DV if spec.objective.reduce == "mean" else 1),
        momentum=x["momentum"],
        log_decay=x["log_decay"],
        weights=[params[f"W{depth + 1}"] for depth in range(len(params))],
        **norm,
        mini_batch=spec.optimizer.mini_batch,
        gelu="tanh" if spec.regressor.activation == "gelu_tanh" else "erf",
    )
    return output, {name.replace("momentum_", "momentum."): value for name, value in state.items()}


def lact_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return {**draw.qkv(T), "weight": draw.rate(T, 3), "momentum": draw.rate(T), "params": draw.params(spec, DK, DV)}


def lact(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    """The paper's W_0, W_1, W_2 are W1, W2, W3, transposed; its momentum is of what climbs."""
    W1, W2, W3 = (x["params"][name].mT for name in ("W1", "W2", "W3"))
    signals = {"rates": x["weight"], "momentum": x["momentum"]}
    output, state = tr.lact(x["q"], x["k"], x["v"], **signals, W_0=W1, W_1=W2, W_2=W3, chunk=spec.optimizer.mini_batch)
    weights = {f"W{i + 1}": state[f"W_{i}"].mT for i in range(3)}
    return output, weights | {f"momentum.W{i + 1}": -state[f"momentum_W_{i}"].mT for i in range(3)}


def miras_inputs(*signals: str) -> Callable[[Draw, ttr.Spec, int], Inputs]:
    """Decays near 1, as for Titans; rates at which the weights stay near their size."""

    def inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
        rates = {"step": 0.02 * draw.rate(T), "log_decay": F.logsigmoid(draw(B, T, H) + 5)}
        return {**draw.qkv(T, DV, DV), **rates, **{name: 3 * draw.rate(T) for name in signals}, "params": draw.params(spec, DV, DV)}

    return inputs


def miras(transcription: Callable[..., tuple[Tensor, State]], initial: Callable[[Tensor], Tensor] = lambda A: A, factor: float = 1):
    """initial: the paper's weights of ours; factor: the paper's step over ours."""

    def expect(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
        params = dict(x["params"])
        norm = {name: params.pop(name) for name in ("norm_weight", "norm_bias")}
        signals = {name: value for name, value in x.items() if name not in ("q", "k", "v", "params", "step")}
        weights = [initial(params[f"W{depth + 1}"]) for depth in range(len(params))]
        settings = {**norm, "weights": weights, "mini_batch": spec.optimizer.mini_batch}
        return transcription(x["q"], x["k"], x["v"], step=factor * x["step"], **signals, **settings)

    return expect


def on_the_simplex(state: State) -> State:
    return {name: A.softmax(-2) for name, A in state.items()}


def batched_cases(name: str, *given, **more) -> dict[str, Case]:
    online = {"optimizer.mini_batch": 1}
    return {
        name: Case(name, *given, ("definition", "dual"), **more),
        f"{name} in fours": Case(name, *given, ("definition", "dual"), {"optimizer.mini_batch": 4}, **more),
        f"{name} online": Case(name, *given, ("definition",), online, **more),
    }


def omega_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    signals = {"step": 0.1 * draw.rate(T), "log_decay": draw.log_decay(T), "window_weight": draw.rate(T, spec.objective.window)}
    return {**draw.qkv(T), **signals, "params": draw.params(spec, DK, DV)}


def omeganet(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    """The declaration's loss is a mean over channels."""
    assert spec.objective.reduce == "mean"
    weights = [x["params"]["W1"], x["params"]["W2"]]
    signals = {"step": x["step"] / DV, "log_decay": x["log_decay"], "gamma": x["window_weight"]}
    return tr.omeganet(x["q"], x["k"], x["v"], **signals, weights=weights, mini_batch=spec.optimizer.mini_batch)


def atlas_inputs(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return {**omega_inputs(draw, spec, T), "momentum": draw.rate(T)}


def atlas(spec: ttr.Spec, x: Inputs) -> tuple[Tensor, State]:
    """The loss's scale goes into what is turned; its momentum is then ours as well."""
    assert spec.objective.reduce == "mean"
    signals = {"step": x["step"], "momentum": x["momentum"], "log_decay": x["log_decay"], "gamma": x["window_weight"] / DV}
    weights = [x["params"]["W1"], x["params"]["W2"]]
    settings = {"weights": weights, "mini_batch": spec.optimizer.mini_batch, "eps": spec.optimizer.eps}
    o, state = tr.atlas(x["q"], x["k"], x["v"], **signals, **settings)
    return o, {name.replace("momentum_", "momentum."): value for name, value in state.items()}


def plain(draw: Draw, spec: ttr.Spec, T: int) -> Inputs:
    return draw.qkv(T)


CASES = {
    "linear_attention": Case("linear_attention", features, linear_attention),
    "linear_attention_unnormalised": Case("linear_attention_unnormalised", features, matrix(tr.linear_attention_unnormalised)),
    "retnet": Case("retnet", plain, matrix(tr.retnet)),
    "lightning": Case("lightning", plain, matrix(tr.lightning)),
    "gla": Case("gla", lambda draw, spec, T: {**draw.qkv(T), "log_decay": draw.log_decay(T, DK)}, matrix(tr.gla)),
    "mamba2": Case(
        "mamba2",
        lambda draw, spec, T: {**draw.qkv(T), "step": draw.rate(T), "log_decay": draw.log_decay(T)},
        matrix(tr.mamba2),
    ),
    "mlstm": Case("mlstm", mlstm_inputs, mlstm),
    "deltanet": Case("deltanet", lambda draw, spec, T: {**draw.qkv(T), "step": draw.rate(T)}, matrix(tr.deltanet)),
    "gated_deltanet": Case(
        "gated_deltanet",
        lambda draw, spec, T: {**draw.qkv(T), "step": draw.rate(T), "log_decay": draw.log_decay(T)},
        matrix(tr.gated_deltanet),
    ),
    "kda": Case(
        "kda",
        lambda draw, spec, T: {**draw.qkv(T), "step": draw.rate(T), "log_decay": draw.log_decay(T, DK)},
        matrix(tr.kda),
    ),
    "rwkv7": Case("rwkv7", rwkv7_inputs, matrix(tr.rwkv7)),
    "deltaproduct": Case("deltaproduct", deltaproduct_inputs, matrix(tr.deltaproduct)),
    "gated_deltaproduct": Case("gated_deltaproduct", gated_deltaproduct_inputs, matrix(tr.gated_deltaproduct)),
    "longhorn": Case("longhorn", longhorn_inputs, matrix(tr.longhorn), ("definition", "recurrent")),
    "momentum_deltanet": Case(
        "momentum_deltanet",
        lambda draw, spec, T: {**draw.qkv(T), "step": draw.rate(T), "momentum": draw.rate(T)},
        momentum_deltanet,
    ),
    "mesa": Case("mesa", lambda draw, spec, T: {**draw.qkv(T), "params": draw.params(spec, DK, DV)}, mesa, ("definition", "recurrent")),
    "mesanet": Case(
        "mesanet",
        lambda draw, spec, T: {
            **draw.qkv(T),
            "weight": draw.rate(T),
            "log_decay": draw.log_decay(T),
            "params": draw.params(spec, DK, DV),
        },
        mesanet,
    ),
    "ttt_linear": Case("ttt_linear", ttt_inputs, ttt(tr.ttt_linear), ("definition",)),
    "ttt_linear in fours": Case("ttt_linear", ttt_inputs, ttt(tr.ttt_linear), ("definition",), {"optimizer.mini_batch": 4}),
    "ttt_mlp": Case("ttt_mlp", ttt_inputs, ttt(tr.ttt_mlp), ("definition",)),
    "ttt_mlp in fours": Case("ttt_mlp", ttt_inputs, ttt(tr.ttt_mlp), ("definition",), {"optimizer.mini_batch": 4}),
    "titans": Case("titans", titans_inputs, titans, ("definition",)),
    "titans in fours": Case("titans", titans_inputs, titans, ("definition",), {"optimizer.mini_batch": 4}),
    "titans online": Case("titans", titans_inputs, titans, ("definition",), {"optimizer.mini_batch": 1}),
    "lact": Case("lact", lact_inputs, lact, ("definition", "dual")),
    # the norms as the paper has them, of the start; with the preset's eps they move by 1e-10 a step
    "lact in fours": Case("lact", lact_inputs, lact, ("definition", "dual"), {"optimizer.mini_batch": 4, "gate.eps": 1e-7}),
    **batched_cases("yaad", miras_inputs("threshold"), miras(tr.yaad)),
    **batched_cases("moneta", miras_inputs(), miras(tr.moneta, factor=1 / 3)),
    **batched_cases("omeganet", omega_inputs, omeganet),
    "atlas": Case("atlas", atlas_inputs, atlas, ("definition",)),
    "atlas in fours": Case("atlas", atlas_inputs, atlas, ("definition",), {"optimizer.mini_batch": 4}),
    # ours is smooth at N = 0, which changes a length by eps^2 / 2: of a small N, over 70 tokens, by more than the tests allow
    "atlas online": Case("atlas", atlas_inputs, atlas, ("definition",), {"optimizer.mini_batch": 1, "optimizer.eps": 1e-9}),
    **batched_cases("memora", miras_inputs(), miras(tr.memora, initial=lambda A: A.softmax(-2)), seen=on_the_simplex),
    "softmax": Case("softmax", plain, lambda spec, x: (tr.softmax(**x)[0], {}), ("definition", "sdpa")),
    "softmax_window": Case(
        "softmax_window",
        plain,
        lambda spec, x: (tr.softmax_window(**x, window=3)[0], {}),
        ("definition", "sdpa"),
        {"regressor.window": 3},
    ),
}
