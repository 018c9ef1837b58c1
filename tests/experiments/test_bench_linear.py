"""The benchmark's linear memories: the peers' ops get what makes them our function, on the CPU at tiny sizes; nothing is timed."""

import sys
from types import SimpleNamespace

import pytest
import torch

import ttr
from experiments.bench import linear, measure, ops, peers
from experiments.bench.cases import CASES
from experiments.bench.linear import SIGNALS, Linear
from experiments.bench.plan import KINDS, Choice, plan
from experiments.bench.shapes import DEFAULT, EXTENDED, SHAPES, Shape, floor_bytes

LINEAR = {name: case for name, case in CASES.items() if isinstance(case, Linear)}
OURS = [name for name, case in LINEAR.items() if case.declaration is not None]
TINY = Shape(name="", B=2, T=9, H=2, Hv=2, dk=16, dv=16)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(linear, "PATH", "chunk")


def outer(x, y):
    return x[..., :, None] * y[..., None, :]


def look(S, x):
    return (S * x[..., None]).sum(-2)


def simple_gla(S, q, k, v, g):
    return S * g.exp()[..., None, None] + outer(k, v)


def gla(S, q, k, v, g):
    return S * g.exp()[..., None] + outer(k, v)


def delta(S, q, k, v, beta):
    return S + beta[..., None, None] * outer(k, v - look(S, k))


def gated_delta(S, q, k, v, g, beta):
    return delta(S * g.exp()[..., None, None], q, k, v, beta)


def kda(S, q, k, v, g, beta):
    return delta(S * g.exp()[..., None], q, k, v, beta)


def rwkv7(S, r, w, k, v, a, b):
    return S * w.exp()[..., None] + outer(b, look(S, a)) + outer(k, v)


def momentum_delta(both, q, k, v, log_alpha, log_mu, eta):
    S, M = both
    S = S * log_alpha.exp()[..., None, None]
    M = M * log_mu.exp()[..., None, None] - eta[..., None, None] * outer(k, v - look(S, k))
    return torch.stack([S - M, M])


RULES = {f.__name__: f for f in (simple_gla, gla, delta, gated_delta, kda, rwkv7, momentum_delta)}


def peer_reads(name, who="fla"):
    """The op's recurrence in float64 on the tensors that it is given."""
    x = LINEAR[name].inputs(TINY, requires_grad=False, device="cpu")
    if who == "fla-bounded":
        assert all(bool((s >= ops.LOWER_BOUND).all()) for name, s in x.signals.items() if name == "log_decay")
    given = {name: y.double() for name, y in ops.OPS[who, name].tensors(x).items()}
    q = given.get("q", given.get("r"))
    B, T, H, D = q.shape
    if name == "mesa":
        return x, mesa_reads(**given)
    S, outputs = q.new_zeros(*((2,) if name == "momentum_delta" else ()), B, H, D, D), []
    for t in range(T):
        if name == "deltaproduct2":
            S = S * given["g"][:, t].exp()[..., None, None]
            for i in (2 * t, 2 * t + 1):
                S = delta(S, None, *(given[name][:, i] for name in ("k", "v", "beta")))
        else:
            S = RULES[name](S, **{name: y[:, t] for name, y in given.items()})
        outputs.append(look(S[0] if name == "momentum_delta" else S, q[:, t]))
    scale = 1 if name == "rwkv7" else D**-0.5
    return x, scale * torch.stack(outputs, 1)


def mesa_reads(q, k, v, g, beta, lamb):
    G = H = q.new_zeros(len(q), *q.shape[2:], q.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        decay, k_t = g[:, t].exp()[..., None, None], k[:, t]
        weighted = beta[:, t, :, None] * k_t
        G, H = decay * G + outer(weighted, v[:, t]), decay * H + outer(weighted, k_t)
        outputs.append(look(G, torch.linalg.solve(H + torch.diag_embed(lamb), q[:, t])))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("who", "name"), ops.OPS)
def test_a_peer_is_given_what_makes_it_our_function(who, name):
    assert who in LINEAR[name].who
    x, theirs = peer_reads(name, who)
    ours = LINEAR[name].contender("ttr", x).call()
    assert ours.shape == x.like_output.shape and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * float(theirs.abs().mean()))  # bf16


def test_every_peer_of_a_linear_memory_has_an_op():
    asked = {(who, name) for name in OURS for who in LINEAR[name].who if peers.peer_of(who) != "ttr"}
    assert asked == ops.OPS.keys()
    assert ttr.spec(CASES["mesa"].declaration).regressor.ridge_floor == ops.RIDGE_FLOOR
    assert ttr.spec(CASES["mesa"].declaration).optimizer.iterations == ops.OPS["fla", "mesa"].options["max_CG_iteration"]


@pytest.mark.parametrize(("who", "name"), ops.OPS)
def test_gradients_are_taken_of_all_that_a_peer_is_given(monkeypatch, who, name):
    """Also of what was made beforehand, and call after call."""
    op = ops.OPS[who, name]

    def stands_in(**given):
        for option, value in op.options.items():
            assert given.pop(option) == value
        x = given.get("q", given.get("r"))
        return x + sum(y.float().sum() for y in given.values()), None

    monkeypatch.setitem(sys.modules, op.module, SimpleNamespace(**{op.name: stands_in}))
    x = LINEAR[name].inputs(TINY, requires_grad=True, device="cpu")
    contender = LINEAR[name].contender(who, x)
    run = measure._run(contender, torch.ones_like(x.like_output), "both")
    for gradients in (run(), run()):
        assert [g.shape for g in gradients] == [leaf.shape for leaf in contender.leaves]
        assert len(gradients) == len(x.leaves())


@pytest.mark.parametrize("name", OURS)
def test_every_leaf_of_ours_gets_a_gradient(name):
    case = LINEAR[name]
    x = case.inputs(TINY, requires_grad=True, device="cpu")
    for who in ("ttr", *case.others):
        contender = case.contender(who, x)
        gradients = measure._run(contender, torch.randn_like(x.like_output), "both")()
        assert len(gradients) == len(contender.leaves) == len(x.leaves()) - (who != "ttr")
        assert all(bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0 for g in gradients)
    assert case.compared("ttr", x.v, x) is x.v and all(case.compared(who, x.v, x) is None for who in case.others)


@pytest.mark.parametrize("name", LINEAR)
def test_inputs_are_what_the_declaration_asks_for(name):
    case = LINEAR[name]
    x = case.inputs(Shape(name="", B=2, T=3, H=2, Hv=4, dk=8, dv=16), requires_grad=True, device="cpu")
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in x.leaves())
    assert {y.dtype for y in (x.q, x.k, x.v)} == {torch.bfloat16} and all(s.dtype == torch.float32 for s in x.signals.values())
    assert list(x.like_output.shape) == [2, 3, 4, 16] and list(x.token().q.shape) == [2, 2, 8]
    spec = None if case.declaration is None else ttr.spec(case.declaration)
    signals = {} if spec is None else spec.signals()
    assert x.signals.keys() == {name for name, signal in signals.items() if signal.value is None} <= SIGNALS.keys()
    assert all(s.shape[-1] == (8 if signals[name].per == "key" else 4) for name, s in x.signals.items())
    assert (x.write_key is not None) == (spec is not None and spec.separate_write_key)
    if case.unit_keys:
        assert all(float((y.detach().float().norm(dim=-1) - 1).abs().max()) < 0.01 for y in (x.q, x.k))  # bf16
    if "log_decay" in x.signals:
        assert bool((x.signals["log_decay"] <= 0).all())


def test_our_queries_are_scaled_as_the_peers_scale_theirs():
    scales = {name: ttr.spec(LINEAR[name].declaration).scale(64) for name in OURS}
    assert scales == {name: 1.0 if name in ("rwkv7", "mesa") else 64**-0.5 for name in OURS}


def test_what_has_channels_counts_in_the_floor():
    shape = Shape(name="", B=3, T=5, H=2, Hv=2, dk=64, dv=64)
    channels = 3 * 5 * 2 * 64
    gate = floor_bytes(shape, "forward", per_key=1), floor_bytes(shape, "both", per_key=1)
    assert gate == (12 * channels, 34 * channels)  # 8 and a float32 read; 22, that read twice and its gradient written
    assert floor_bytes(shape, "forward", pairs=2) == 12 * channels and floor_bytes(shape, "both", pairs=2) == 34 * channels
    assert LINEAR["kda"].floor_bytes(shape, "both") == gate[1]
    assert LINEAR["rwkv7"].floor_bytes(shape, "forward") == (8 + 2 + 2 * 4) * channels
    assert LINEAR["deltaproduct2"].floor_bytes(shape, "forward") == 12 * channels
    assert LINEAR["momentum_delta"].floor_bytes(shape, "both") == LINEAR["sdpa"].floor_bytes(shape, "both") == 22 * channels


def test_the_slow_ones_are_measured_at_one_shape_and_only_what_fla_decodes_is_decoded():
    new = ["gla", "kda", "rwkv7", "deltaproduct2", "momentum_delta", "mesa"]
    groups, left_out = plan(Choice(cases=new, kinds=KINDS, there=["fla"]))
    shapes = {name: [group.shape for group in groups if group.case.name == name and group.kind == "both"] for name in new}
    assert shapes == {name: list(DEFAULT[:1] if name in new[-2:] else DEFAULT) for name in new}
    assert left_out == [] and not any(group.kind == "decode" for group in groups)
    assert {group.whos for group in groups if group.case.name == "momentum_delta" and group.kind == "both"} == {
        ("ttr", "fla", "ttr-gated_delta")
    }

    groups, left_out = plan(Choice(cases=new, kinds=["forward"], there=[], extended=True))
    assert all(peers.peer_of(who) == "ttr" for group in groups for who in group.whos) and left_out == []
    assert {group.shape for group in groups} == {*DEFAULT, *EXTENDED} <= set(SHAPES.values())
