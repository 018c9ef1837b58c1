"""The arguments of `ttr.regress`: what is refused, naming the argument, what came and what was expected; what is taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ttr
from ttr import testing

B, T, H, HV, DK, DV = 2, 9, 2, 4, 4, 3
BARE = {"layer": {"qk": [], "v": [], "output": []}}
DELTA = ttr.spec({"optimizer": "delta", **BARE})
GATED = ttr.spec({"optimizer": "delta", "gate": "scalar", **BARE})
VECTOR = ttr.spec({"optimizer": "delta", "gate": "vector", **BARE})
FIXED = ttr.spec({"optimizer": "delta", "gate": {"kind": "fixed", "decay": [-0.1, -0.2, -0.3, -0.4]}, **BARE})
STEPS = ttr.spec({"optimizer": {"kind": "delta", "steps": 3}, **BARE})
SEPARATE = ttr.spec({"optimizer": {"kind": "delta", "write_key": "separate"}, **BARE})
PER_KEY = ttr.spec({"optimizer": {"kind": "delta", "step": {"per": "key"}}, **BARE})
PER_VALUE = ttr.spec({"optimizer": {"kind": "delta", "step": {"per": "value"}}, **BARE})
NUMBER = ttr.spec({"optimizer": {"kind": "delta", "step": 0.5}, "gate": {"kind": "scalar", "value": -0.1}, **BARE})
MLP = ttr.spec({"regressor": {"kind": "mlp", "residual": False, "norm": "none"}, "optimizer": "delta", **BARE})
SOFTMAX = ttr.spec("softmax")
SQUARES = ttr.spec("mesanet", optimizer="cholesky", gate="none")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(spec: Any = DELTA, path: Any = "auto", **changes: Any) -> tuple[Tensor, ttr.State]:
    """A call that is right but for `changes`; a change to None leaves the argument out."""
    arguments: dict[str, Any] = {
        "q": draw(B, T, H, DK), "k": F.normalize(draw(B, T, H, DK, seed=1), dim=-1), "v": draw(B, T, HV, DV, seed=2),
    }  # fmt: skip
    spec = ttr.spec(spec)
    for name, s in spec.signals().items():
        if not s.constant:
            width = {"key": (DK,), "value": (DV,)}.get(s.per, ())
            arguments[name] = draw(B, T, HV, *width, seed=3).sigmoid() * (-1 if name == "log_decay" else 1)
    if spec.separate_write_key:
        arguments["write_key"] = draw(B, T, H, DK, seed=4)
    if spec.regressor.kind == "mlp":
        arguments["params"] = spec.init_params(HV, DK, DV, generator=torch.Generator().manual_seed(0))
    arguments = {name: value for name, value in (arguments | changes).items() if value is not None}
    return ttr.regress(**arguments, spec=spec, path=path)


def row(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def packed(spec: Any = DELTA) -> dict[str, Any]:
    """One row of T tokens."""
    return {"q": draw(1, T, H, DK), "k": draw(1, T, H, DK), "v": draw(1, T, HV, DV), "step": torch.ones(1, T, HV, dtype=torch.float64)}


REFUSED = {
    # shapes
    "q": (DELTA, {"q": draw(T, H, DK)}, "q: got shape [9, 2, 4], expected [B, T, H, dk]"),
    "k length": (DELTA, {"k": draw(B, T + 1, H, DK)}, "k: got shape [2, 10, 2, 4], expected [2, 9, 2, 4] as q"),
    "k width": (DELTA, {"k": draw(B, T, H, DK + 1)}, "k: got shape [2, 9, 2, 5], expected [2, 9, 2, 4] as q"),
    "k heads": (DELTA, {"k": draw(B, T, HV, DK)}, "k: got shape [2, 9, 4, 4], expected [2, 9, 2, 4] as q"),
    "k with micro-steps": (DELTA, {"k": draw(B, T, 3, H, DK)}, "k: got shape [2, 9, 3, 2, 4], expected [2, 9, 2, 4] as q"),
    "k with too few micro-steps": (STEPS, {"k": draw(B, T, 2, H, DK)}, "k: got shape [2, 9, 2, 2, 4], expected [2, 9, 2, 4] as q or [2, 9, 3, 2, 4]"),
    "v batch": (DELTA, {"v": draw(B + 1, T, HV, DV)}, "v: got shape [3, 9, 4, 3], expected [2, 9, Hv, dv]"),
    "v axes": (DELTA, {"v": draw(B, T, DV)}, "v: got shape [2, 9, 3], expected [2, 9, Hv, dv]"),
    "v with too many micro-steps": (STEPS, {"v": draw(B, T, 4, HV, DV)},
        "v: got shape [2, 9, 4, 4, 3], expected [2, 9, Hv, dv] or [2, 9, 3, Hv, dv]"),
    "value heads": (DELTA, {"v": draw(B, T, 3, DV), "step": 1.0}, "v: got 3 value heads, expected a multiple of q's 2 key heads"),
    "residual widths": ({"regressor": "mlp", "optimizer": "delta"}, {"params": None}, "needs dk = dv, got dk=4, dv=3"),
    # kinds of tensors
    "no tensor": (DELTA, {"k": [[1.0]]}, "k: got list, expected a tensor"),
    "integers": (DELTA, {"v": torch.ones(B, T, HV, DV, dtype=torch.int64)}, "v: got dtype torch.int64, expected a floating-point dtype"),
    "integer q": (DELTA, {"q": torch.ones(B, T, H, DK, dtype=torch.int32)}, "q: got dtype torch.int32"),
    "complex k": (DELTA, {"k": draw(B, T, H, DK).cfloat()}, "k: got dtype torch.complex64, expected a floating-point dtype"),
    "device": (DELTA, {"k": draw(B, T, H, DK).to("meta")}, "k is on meta, q on cpu"),
    # write keys
    "write_key missing": (SEPARATE, {"write_key": None}, "write_key is missing: the declaration says optimizer.write_key='separate'"),
    "write_key too many": (DELTA, {"write_key": draw(B, T, H, DK)}, "write_key was given, but the declaration has optimizer.write_key='same'"),
    "write_key shape": (SEPARATE, {"write_key": draw(B, T, HV, DK)}, "write_key: got shape [2, 9, 4, 4], expected [2, 9, 2, 4] as q"),
    # signals
    "unknown signal": (DELTA, {"stpe": 1.0}, "signal='stpe' is not known; choose from ['step']. Did you mean 'step'?"),
    "undeclared signal": (DELTA, {"momentum": 1.0}, "signal='momentum' is not known; choose from ['step']"),
    "log_decay without gate": (DELTA, {"log_decay": -1.0}, "signal='log_decay' is not known"),
    "plural": (GATED, {"log_decay": None, "log_decays": -1.0},
        "signal='log_decays' is not known; choose from ['log_decay', 'step']. Did you mean 'log_decay'?"),
    "signal of softmax": (SOFTMAX, {"step": 1.0}, "signal='step' is not known; there is none here"),
    "missing step": (DELTA, {"step": None}, "step is missing: it is declared per token (map 'sigmoid'); pass its values, [2, 9, 4] (per head)"),
    "missing gate": (VECTOR, {"log_decay": None}, "log_decay is missing", "[4] or [2, 9, 4] or [2, 9, 4, 4] (per key), natural log"),
    "step shape": (DELTA, {"step": draw(B, T, H)}, "step: got shape [2, 9, 2], expected [2, 9, 4] (per head)"),
    "step per key": (PER_KEY, {"step": draw(B, T, HV)}, "step: got shape [2, 9, 4], expected [2, 9, 4, 4] (per key)"),
    "step per value": (PER_VALUE, {"step": draw(B, T, HV, DK)}, "step: got shape [2, 9, 4, 4], expected [2, 9, 4, 3] (per value)"),
    "step per head only": (DELTA, {"step": draw(B, T, HV, DK)}, "step: got shape [2, 9, 4, 4], expected [2, 9, 4] (per head)"),
    "step of heads": (DELTA, {"step": draw(HV)}, "step: got shape [4], expected [2, 9, 4] (per head)"),
    "step micro-steps": (STEPS, {"step": draw(B, T, 2, HV)}, "step: got shape [2, 9, 2, 4], expected [2, 9, 4] (per head) or [2, 9, 3, 4]"),
    "step is a list": (DELTA, {"step": [1.0]}, "step: got list, expected a tensor or a number"),
    "step is a word": (DELTA, {"step": "sigmoid"}, "step: got str, expected a tensor or a number"),
    "step is true": (DELTA, {"step": True}, "step: got bool, expected a tensor or a number"),
    "negative weight": (SQUARES, {"weight": -draw(B, T, HV).abs()}, "weight: got a minimum of -", "expected >= 0, as declared"),
    # gates
    "a factor for its log": (GATED, {"log_decay": draw(B, T, HV).sigmoid()}, "log_decay: got a maximum of", "natural logs <= 0 (is this a factor"),
    "nan": (GATED, {"log_decay": torch.full((B, T, HV), math.nan)}, "log_decay: got NaN, expected natural logs <= 0"),
    "positive number": (GATED, {"log_decay": 0.5}, "log_decay: got a maximum of 0.5, expected natural logs <= 0"),
    "gate heads": (GATED, {"log_decay": -draw(H).abs()}, "log_decay: got shape [2], expected [4] or [2, 9, 4], natural log"),
    "gate per key": (GATED, {"log_decay": -draw(B, T, HV, DK).abs()}, "log_decay: got shape [2, 9, 4, 4], expected [4] or [2, 9, 4], natural log"),
    "vector gate": (VECTOR, {"log_decay": -draw(B, T, HV, DV).abs()}, "log_decay: got shape [2, 9, 4, 3], expected [4] or [2, 9, 4] or [2, 9, 4, 4]"),
    "fixed gate's override": (FIXED, {"log_decay": -draw(B, T, H).abs()}, "log_decay: got shape [2, 9, 2], expected [4] or [2, 9, 4], natural log"),
    "fixed gate's override grows": (FIXED, {"log_decay": torch.ones(HV)}, "log_decay: got a maximum of 1, expected natural logs <= 0"),
    "fixed gate of other heads": (FIXED, {"v": draw(B, T, H, DV), "step": 1.0}, "gate.decay lists 4 decays for 2 heads"),
    # learned constants
    "no params": (MLP, {"params": None}, "params is missing ['W1', 'W2']", "params=ttr.spec(...).init_params(4, 4, 3) makes them"),
    "a param as a signal": (MLP, {"W1": draw(HV, 4, 16)}, "W1 is a learned constant of this declaration, not a signal: pass params={'W1': ...}"),
    "params of nothing": (DELTA, {"params": {"W": draw(HV, DK, DV)}}, "params: name='W' is not known; there is none here"),
    "params misspelt": (MLP, {"params": {"W1": draw(HV, 4, 16), "w2": draw(HV, 16, 3)}}, "params: name='w2' is not known", "Did you mean 'W2'?"),
    "params shape": (MLP, {"params": {"W1": draw(HV, 4, 16), "W2": draw(HV, 16, 4)}}, "params['W2']: got shape [4, 16, 4], expected [4, 16, 3]"),
    "params heads": (MLP, {"params": {"W1": draw(H, 4, 16), "W2": draw(H, 16, 3)}}, "params['W1']: got shape [2, 4, 16], expected [4, 4, 16]"),
    "params number": (MLP, {"params": {"W1": 1.0, "W2": 1.0}}, "params['W1']: got float, expected [4, 4, 16]"),
    "params list": (MLP, {"params": [draw(HV, 4, 16)]}, "params: got list, expected a mapping from names to tensors"),
    # states
    "bare state": (DELTA, {"initial_state": draw(B, HV, DV, DK)}, "initial_state: got shape [2, 4, 3, 4], expected [2, 4, 4, 3]"),
    "bare state of key heads": (DELTA, {"initial_state": draw(B, H, DK, DV)}, "initial_state: got shape [2, 2, 4, 3], expected [2, 4, 4, 3]"),
    "bare state of an mlp": (MLP, {"initial_state": draw(B, HV, DK, DV)}, "initial_state: a bare tensor is the W of a linear regressor",
        "pass a State"),
    "bare state with a normaliser": ("linear_attention", {"initial_state": draw(B, HV, DK, DV)}, "without a normalizer; pass a State"),
    "bare state of softmax": (SOFTMAX, {"initial_state": draw(B, HV, DK, DV)}, "initial_state: a bare tensor is the W of a linear regressor"),
    "state is a mapping": (DELTA, {"initial_state": {"W": draw(B, HV, DK, DV)}}, "initial_state: got dict, expected a ttr.State or a tensor"),
    "state without weights": (DELTA, {"initial_state": ttr.State({}, spec_hash=DELTA.hash)},
        "initial_state holds [], expected ['weights.W']"),
    "packed states": (DELTA, {**packed(), "cu_seqlens": row(4, 5), "initial_state": draw(1, HV, DK, DV)},
        "got shape [1, 4, 4, 3], expected [2, 4, 4, 3]"),
    # packed sequences
    "cu_seqlens list": (DELTA, {**packed(), "cu_seqlens": [0, T]}, "cu_seqlens: got list, expected a tensor, [N+1] int32"),
    "cu_seqlens floats": (DELTA, {**packed(), "cu_seqlens": torch.tensor([0.0, T])},
        "cu_seqlens: got torch.float32 of shape [2], expected [N+1] int32"),
    "cu_seqlens axes": (DELTA, {**packed(), "cu_seqlens": row(T)[None]}, "cu_seqlens: got torch.int32 of shape [1, 2], expected [N+1] int32"),
    "cu_seqlens alone": (DELTA, {**packed(), "cu_seqlens": row()}, "cu_seqlens: got torch.int32 of shape [1], expected [N+1]"),
    "cu_seqlens batch": (DELTA, {"cu_seqlens": row(T)}, "cu_seqlens packs sequences into one row: expected B = 1, got B = 2"),
    "cu_seqlens end": (DELTA, {**packed(), "cu_seqlens": row(4)}, "cu_seqlens=[0, 4]: expected 0 = c_0 <= c_1 <= ... <= c_N = T = 9"),
    "cu_seqlens start": (DELTA, {**packed(), "cu_seqlens": row(4, 5)[1:]}, "cu_seqlens=[4, 9]: expected 0 = c_0"),
    "cu_seqlens order": (DELTA, {**packed(), "cu_seqlens": row(6, -2, 5)}, "cu_seqlens=[0, 6, 4, 9]: expected 0 = c_0 <= c_1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    spec, changes, *expected = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        call(spec, **changes)
    for part in expected:
        assert part in str(refused.value)


def test_the_declaration_in_front_is_told_where_it_belongs():
    with pytest.raises(ValueError, match=r"q: got str, expected a tensor; the declaration comes fourth, regress\(q, k, v, spec\)"):
        ttr.regress("gated_deltanet", *(torch.randn(1, 3, 2, 4) for _ in range(3)))


def test_states_that_do_not_fit():
    with pytest.raises(ValueError, match="initial_state was made under another declaration") as refused:
        call(DELTA, initial_state=call(GATED)[1])
    assert GATED.hash in str(refused.value) and DELTA.hash in str(refused.value)
    with pytest.raises(ValueError, match=r"initial_state.weights.W: got shape \[1, 4, 4, 3\], expected \[2, 4, 4, 3\]"):
        call(DELTA, initial_state=call(DELTA)[1].index_select(torch.tensor([0])))


HUBER = {"optimizer": {"kind": "sgd", "step": 1.0}, "objective": "huber", **BARE}
PATHS = {
    "unknown": (DELTA, "chunky", "path='chunky' is not known; choose from ['auto', 'chunk', 'definition', 'dual', 'recurrent', 'sdpa', 'triton']. Did you mean 'chunk'?"),
    "chunk of huber": (HUBER, "chunk", "path='chunk' cannot serve", "the gradient of objective 'huber' is not affine in the prediction"),
    "recurrent of an mlp": (MLP, "recurrent", "path='recurrent' cannot serve", "regressor 'mlp' is not linear in its weights"),
    "chunk per value": (PER_VALUE, "chunk", "path='chunk' cannot serve", "['step'] per value channel gives each column its own triangular system"),
    "dual of single tokens": (DELTA, "dual", "path='dual' cannot serve"),
    "chunk of softmax": (SOFTMAX, "chunk", "choose from ['auto', 'sdpa', 'definition']"),
    "unknown option": (DELTA, {"kind": "chunk", "chunksize": 4},
        "path 'chunk': option='chunksize' is not known; choose from ['chunk_size']. Did you mean 'chunk_size'?"),
    "option of another path": (DELTA, {"kind": "recurrent", "chunk_size": 4}, "path: 'recurrent' has no options, got 'chunk_size'"),
    "chunk_size": (DELTA, {"kind": "chunk", "chunk_size": 12}, "chunk_size=12: expected a power of two"),
    "no path": (DELTA, 3, "path: got int, expected a path's name or a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_cannot_serve_say_why(name):
    spec, path, *expected = PATHS[name]
    spec = ttr.spec(spec)
    changes = {"params": spec.init_params(HV, DK, DV)} if spec.param_shapes(HV, DK, DV) else {}
    with pytest.raises(ValueError) as refused:
        call(spec, path=path, **changes)
    for part in expected:
        assert part in str(refused.value)


def test_a_wrong_path_is_refused_for_no_tokens_too():
    with pytest.raises(ValueError, match="path='sdpa' cannot serve"):
        ttr.regress(draw(1, 0, H, DK), draw(1, 0, H, DK), draw(1, 0, HV, DV), DELTA, step=1.0, path="sdpa")


# What is taken


def same(left: tuple[Tensor, ttr.State], right: tuple[Tensor, ttr.State]) -> None:
    torch.testing.assert_close(left[0], right[0], rtol=1e-12, atol=1e-12)
    for name, w in left[1].weights.items():
        torch.testing.assert_close(w, right[1].weights[name], rtol=1e-12, atol=1e-12)


def full(value: float, *width: int) -> Tensor:
    return torch.full((B, T, HV, *width), value, dtype=torch.float64)


@pytest.mark.parametrize("number", [0.3, torch.tensor(0.3, dtype=torch.float64), 1])
def test_a_number_stands_for_all_tokens(number):
    for spec, width in ((DELTA, ()), (PER_KEY, (DK,)), (PER_VALUE, (DV,)), (STEPS, ())):
        same(call(spec, step=number), call(spec, step=full(float(number), *width)))


def test_declared_numbers_may_be_left_out_or_given():
    same(call(NUMBER), call(NUMBER, step=full(0.5), log_decay=full(-0.1)))
    same(call(NUMBER, step=full(0.7)), call(GATED, step=0.7, log_decay=-0.1))


def test_log_decay_may_be_per_head():
    per_head = -draw(HV).abs()
    same(call(GATED, log_decay=per_head), call(GATED, log_decay=per_head.expand(B, T, HV)))
    same(call(VECTOR, log_decay=per_head), call(VECTOR, log_decay=per_head[:, None].expand(B, T, HV, DK)))
    scalar = -draw(B, T, HV).abs()
    same(call(VECTOR, log_decay=scalar), call(VECTOR, log_decay=scalar[..., None].expand(B, T, HV, DK)))
    same(call(FIXED), call(FIXED, log_decay=torch.tensor([-0.1, -0.2, -0.3, -0.4], dtype=torch.float64)))
    same(call(FIXED, log_decay=scalar), call(GATED, log_decay=scalar))


def test_micro_steps_may_repeat_a_pair():
    k, v, step = draw(B, T, H, DK), draw(B, T, HV, DV), draw(B, T, HV).sigmoid()
    repeated = {"k": k[:, :, None].expand(B, T, 3, H, DK), "v": v[:, :, None].expand(B, T, 3, HV, DV)}
    same(call(STEPS, k=k, v=v, step=step), call(STEPS, **repeated, step=step[:, :, None].expand(B, T, 3, HV)))


def test_value_heads_share_key_heads():
    """H key heads and Hv value heads are Hv of each, the keys repeated: head h reads with key head h // (Hv / H)."""
    q, k, write_key = draw(B, T, H, DK), draw(B, T, H, DK, seed=1), draw(B, T, H, DK, seed=4)
    q_, k_, w_ = (x.repeat_interleave(HV // H, 2) for x in (q, k, write_key))
    for spec in (DELTA, GATED, VECTOR, PER_KEY):
        same(call(spec, q=q, k=k), call(spec, q=q_, k=k_))
    same(call(MLP, q=q, k=k, step=0.05), call(MLP, q=q_, k=k_, step=0.05))
    same(call(SEPARATE, q=q, k=k, write_key=write_key), call(SEPARATE, q=q_, k=k_, write_key=w_))
    same(call(SOFTMAX, q=q, k=k), call(SOFTMAX, q=q_, k=k_))


def test_a_bare_tensor_is_the_initial_weights():
    W = draw(B, HV, DK, DV)
    for spec in (DELTA, GATED, ttr.spec(DELTA, optimizer="momentum"), ttr.spec(DELTA, **{"optimizer.mini_batch": 4})):
        signals = {name: 0.5 for name in spec.signals() if name != "log_decay"}
        _, empty = call(spec, **signals, q=draw(B, 0, H, DK), k=draw(B, 0, H, DK), v=draw(B, 0, HV, DV), **no_gate(spec), initial_state=W)
        assert torch.equal(empty.weights["W"], W) and empty.spec_hash == spec.hash
        same(call(spec, **signals, initial_state=W), call(spec, **signals, initial_state=empty))


def no_gate(spec: ttr.Spec) -> dict[str, Tensor]:
    return {"log_decay": torch.zeros(B, 0, HV)} if "log_decay" in spec.signals() else {}


@pytest.mark.parametrize("name", ttr.presets())
def test_no_tokens_leave_the_state_as_it_is(name):
    spec = ttr.spec(name)
    case = testing.random_inputs(spec, T=3, B=2, dk=4, dv=4)
    o, before = testing.call(case)
    o, after = testing.call(testing.replace(case.tokens(3, 3), initial_state=before))
    assert o.shape == (2, 0, 2, 4)
    assert testing.flatten(after.to_dict()["weights"]).keys() == testing.flatten(before.to_dict()["weights"]).keys()
    for left, right in zip(tensors(after), tensors(before), strict=True):
        assert torch.equal(left, right)
    o, first = testing.call(testing.replace(case.tokens(0, 0), initial_state=None))
    o, _ = testing.call(testing.replace(case, initial_state=first))
    torch.testing.assert_close(o, testing.call(testing.replace(case, initial_state=None))[0], rtol=1e-12, atol=1e-12)


def tensors(state: ttr.State) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ttr.presets())
def test_dtypes(name, dtype):
    """Outputs come in the inputs' dtype, the state in float32, or in float64 for float64 inputs."""
    case = testing.random_inputs(name, T=9, B=1, dk=4, dv=4, extreme=False, state=False).to(dtype)
    o, state = testing.call(case)
    assert o.dtype == dtype and torch.isfinite(o).all()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in tensors(state) if t.is_floating_point()} == {expected}
    exact, _ = testing.call(case.to(torch.float64))
    unit = torch.finfo(dtype).eps
    assert testing.relative_error(o, exact) < (1e-12 if dtype == torch.float64 else 64 * unit if dtype == torch.float32 else unit)


def test_a_number_keeps_its_precision_among_low_precision_inputs():
    """Half-precision inputs are computed with in float32, and so is a number beside them."""
    low = {"q": draw(B, T, H, DK).bfloat16(), "k": draw(B, T, H, DK).bfloat16(), "v": draw(B, T, HV, DV).bfloat16()}
    _, state = call(NUMBER, **low, step=0.3, log_decay=-0.01)
    _, exact = call(NUMBER, **{name: x.double() for name, x in low.items()}, step=0.3, log_decay=-0.01)
    assert testing.relative_error(state.weights["W"], exact.weights["W"]) < 1e-5


def test_one_float64_input_makes_the_computation_float64():
    single = {"q": draw(B, T, H, DK).float(), "k": draw(B, T, H, DK).float(), "v": draw(B, T, HV, DV).float()}
    step = full(0.3).float()
    assert call(**single, step=step)[1].weights["W"].dtype == torch.float32
    for name in single:
        o, state = call(**{**single, name: single[name].double()}, step=step)
        assert state.weights["W"].dtype == torch.float64 and o.dtype == (torch.float64 if name == "v" else torch.float32)
    assert call(**single, step=step.double())[1].weights["W"].dtype == torch.float64
    assert call(**single, step=step, initial_state=draw(B, HV, DK, DV))[1].weights["W"].dtype == torch.float64


def test_scale_multiplies_the_query():
    o, _ = call(scale=1.0)
    same(call(), (o * DK**-0.5, call()[1]))
    same(call(ttr.spec(DELTA, **{"read.scale": 2.0})), (2 * o, call()[1]))


def test_the_layer_never_acts():
    other = ttr.spec(DELTA, layer={"qk": ["conv", "elu1", "l2"], "v": ["silu"], "output": ["rms"], "head_dim": 8})
    same(call(other), call(DELTA))
