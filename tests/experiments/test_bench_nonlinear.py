"""The benchmark's nonlinear memories: what is called computes what the case says, on the CPU at tiny sizes; nothing is timed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ttr
from experiments.bench import flops, layers, measure, output, peers, tables, timing
from experiments.bench.case import COMPILED
from experiments.bench.cases import CASES, WHOS
from experiments.bench.growth import growths
from experiments.bench.picture import COLOURS, LABELS
from experiments.bench.plan import KINDS, Choice, plan
from experiments.bench.shapes import SHAPES, Shape

TINY = Shape(name="", B=2, T=40, H=2, Hv=2, dk=16, dv=16)
LAYERS = {"titans": Shape(name="", B=2, T=130, H=2, Hv=2, dk=16, dv=16), "lact": Shape(name="", B=1, T=2050, H=1, Hv=1, dk=16, dv=16)}
RUN = {
    "kind": "run", "command": "python -m experiments.bench", "date": "2026-11-22", "gpu": "a GPU", "bandwidth_tb_s": 4.3,
    "matmul_tflop_s": 700.0, "versions": {"torch": "2.11.0"}, "left_out": [],
}  # fmt: skip
BENCH = measure.Bench(bandwidth=4e12, matmul=7e14, effort=timing.QUICK)


def row(kind, case="titans", shape="8x2048-d64", who="ttr", **figures):
    return {"kind": kind, "case": case, "shape": shape, "who": who, **figures}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Nothing is compiled for these few tokens: that takes minutes on a CPU."""
    monkeypatch.setattr(layers, "PATHS", {"titans": "dual", "lact": "dual"})


def fla_reads(x):
    """fla's naive TTT-Linear: Z + LN(Z) of every token and the last weights, its eta being the reading token's."""
    q, k, v, eta = (y.detach().float().transpose(1, 2) for y in (x.q, x.k, x.v, x.eta))
    W, b = x.W.detach().expand(len(q), -1, -1, -1), x.b.detach()[:, None].expand(len(q), -1, -1, -1)
    D = q.shape[-1]

    def standardised(z):
        std = (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return (z - z.mean(-1, keepdim=True)) / std, std

    outputs = []
    for q16, k16, v16, rate in zip(*(y.split(16, 2) for y in (q, k, v, eta)), strict=True):
        rate = rate[..., None]
        k_hat, std = standardised(k16 @ W + b)
        e = k_hat - (v16 - k16)
        g = (D * e - e.sum(-1, keepdim=True) - k_hat * (e * k_hat).sum(-1, keepdim=True)) / (D * std)
        scores = torch.tril(q16 @ k16.mT)
        z = q16 @ W + b - (rate * scores) @ g - rate * g.cumsum(2)
        W, b = W - rate[:, :, -1:] * (k16.mT @ g), b - rate[:, :, -1:] * g.sum(2, keepdim=True)
        outputs.append(z + standardised(z)[0])
    return torch.cat(outputs, 2).transpose(1, 2), W, b


def test_our_ttt_linear_writes_what_fla_writes_and_what_is_compared_is_the_same():
    case = CASES["ttt_linear"]
    x = case.inputs(TINY, requires_grad=False, device="cpu")
    theirs, W, b = fla_reads(x)
    ours = case.compared("ttr", case.contender("ttr", x).call(), x)
    torch.testing.assert_close(ours, case.compared("fla", theirs, x), rtol=0, atol=0.02)  # our output is rounded to bf16
    params = {"W1": x.W, "b1": x.b, "norm_weight": x.norm_weight, "norm_bias": x.norm_bias}
    q, k, v = (y.float() for y in (x.q, x.k, x.v))  # as theirs: in bf16 the operands would be rounded
    state = ttr.regress(q, k, v, case.declaration, step=16 * x.eta.float(), params=params)[1]
    torch.testing.assert_close(state.weights["W1"], W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.weights["b1"], b[:, :, 0], rtol=1e-3, atol=1e-4)


def test_the_rates_are_one_number_for_every_16_tokens():
    x = CASES["ttt_linear"].inputs(TINY, requires_grad=True, device="cpu")
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in x.leaves())
    rates = x.eta.detach()
    assert list(rates.shape) == [2, 40, 2] and bool((rates[:, :16] == rates[:, :1]).all() and (rates[:, 32:] == rates[:, 32:33]).all())
    assert not bool((rates[:, 15] == rates[:, 16]).all())


EAGER = [("ttt_linear", "ttr"), *((name, who) for name in LAYERS for who in CASES[name].who if who != COMPILED)]


@pytest.mark.parametrize(("name", "who"), EAGER)
def test_every_leaf_of_a_contender_gets_a_gradient(name, who):
    if who != "ttr":
        pytest.importorskip(peers.peer_of(who))
    case = CASES[name]
    x = case.inputs(LAYERS.get(name, TINY), requires_grad=True, device="cpu")
    contender = case.contender(who, x)
    gradients = measure._run(contender, torch.randn_like(x.like_output), "both")()
    assert len(gradients) == len(contender.leaves) > 3
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0 for g in gradients)

    x = case.inputs(LAYERS.get(name, TINY), requires_grad=False, device="cpu")
    contender = case.contender(who, x)
    o = measure._run(contender, x.like_output, "forward")()
    assert o.shape == x.like_output.shape and o.dtype == torch.bfloat16
    assert not o.requires_grad and not any(leaf.requires_grad for leaf in contender.leaves)


def test_two_layers_of_one_case_start_from_the_same_input_and_seed():
    case, shape = CASES["titans"], LAYERS["titans"]
    before = torch.random.get_rng_state()
    runs = [case.contender("ttr", case.inputs(shape, requires_grad=False, device="cpu")).call() for _ in range(2)]
    assert torch.equal(*runs) and torch.equal(before, torch.random.get_rng_state())


def test_the_operations_of_lact_are_those_of_its_matmuls():
    """What our layer counts beyond the formula: a momentum slot multiplied along, a prediction that the inner product needs not."""
    shape = Shape(name="", B=2, T=96, H=2, Hv=2, dk=32, dv=32)
    mixer = ttr.Mixer(64, {"base": "lact", "optimizer": {"mini_batch": 32}}, n_heads=2)
    x = torch.randn(2, 96, 64, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        o = mixer(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(o, [x, *mixer.parameters()], torch.randn_like(o))
    counted = flops.lact(shape, "forward", mini_batch=32), flops.lact(shape, "both", mini_batch=32)
    assert counted[0] <= forward.get_total_flops() <= 1.2 * counted[0]
    assert counted[1] - counted[0] <= backward.get_total_flops() <= 1.2 * (counted[1] - counted[0])


def test_every_case_has_shapes_of_its_own():
    nonlinear = ["ttt_linear", "titans", "lact"]
    groups, left_out = plan(Choice(cases=nonlinear, kinds=KINDS, there=["fla", "titans_pytorch"], extended=True, cold_peers=True))
    assert left_out == [] and not any(group.kind == "decode" for group in groups)
    at = {(group.case.name, group.shape.name): group.whos for group in groups if group.kind == "both"}
    assert at["ttt_linear", "8x2048-d64"] == ("ttr", "ttr-compiled", "fla", "fla-fused")
    assert at["titans", "2x8192-d64"] == ("ttr", "ttr-compiled", "titans_pytorch", "titans_pytorch-b64")
    assert at["lact", "1x16384-h4-d256"] == ("ttr", "ttr-compiled")
    assert {SHAPES[shape].B * SHAPES[shape].T for _, shape in at} == {16384}
    assert [g.whos for g in groups if g.kind == "cold"] == [(who,) for name in nonlinear for who in CASES[name].who]

    groups, left_out = plan(Choice(cases=["titans", "lact"], shapes=["8x2048-d64"], kinds=["forward"], there=["fla"]))
    assert [(group.case.name, group.whos) for group in groups] == [("titans", ("ttr", "ttr-compiled"))]
    assert left_out == ["lact: has 1x16384-h4-d256"]


def test_a_layer_is_held_against_matmuls_and_an_op_against_memory():
    op = BENCH.yardsticks(CASES["ttt_linear"], SHAPES["8x2048-d64"], "both")
    assert op == {"floor_ms": 1e3 * 8 * 2048 * 16 * 22 * 64 / 4e12}
    assert BENCH.yardsticks(CASES["titans"], SHAPES["8x2048-d64"], "both") == {}
    layer = BENCH.yardsticks(CASES["lact"], SHAPES["1x16384-h4-d256"], "forward")
    projections, products = 8 * 16384 * 1024**2, 9 * 2 * 16384 * 1024 * 256
    assert layer["flops"] == projections + products + 8 * 4 * 3 * 5 * 6 * 256**3
    assert layer["matmul_ms"] == layer["flops"] / 7e11


def test_outputs_of_layers_are_not_compared_and_what_is_not_finite_is_said(monkeypatch):
    case, tiny = CASES["titans"], LAYERS["titans"]
    inputs, contender = type(case).inputs, type(case).contender
    monkeypatch.setattr(type(case), "inputs", lambda self, shape, requires_grad: inputs(self, tiny, requires_grad=False, device="cpu"))
    monkeypatch.setattr(type(case), "contender", lambda self, who, x: contender(self, "ttr", x))
    monkeypatch.setattr(timing, "median_ms", lambda run, effort: 2.0)
    monkeypatch.setattr(timing, "check_device", lambda: None)
    monkeypatch.setattr(measure.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure.torch, "isfinite", torch.isnan)
    rows = list(measure.sequence(BENCH, "forward", case, SHAPES["8x2048-d64"], ("ttr", "titans_pytorch"), compare=False))
    assert [r["note"] for r in rows] == [
        "path dual; the output is not finite",
        "gradients at the initial weights; the output is not finite",
    ]
    assert all(r["ms"] == 2.0 and "difference" not in r and "floor_ms" not in r for r in rows)


def test_a_slow_call_is_timed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "once_ms", lambda call: call() or 2 * timing.SLOW_MS)
    assert timing.median_ms(lambda: calls.append(1), timing.QUICK) == 2 * timing.SLOW_MS and calls == [1]


def test_growth_is_time_a_token_at_as_many_tokens():
    times = {"32x512-d64": 8.0, "8x2048-d64": 16.0, "1x16384-d64": 32.0}
    rows = [row("both", shape=shape, ms=ms, peak_bytes=2**20) for shape, ms in times.items()]
    rows += [row("both", shape=shape, who="titans_pytorch", ms=1.0) for shape in list(times)[:2]]  # two lengths are no growth
    rows += [row("forward", case="delta", shape="8x2048-d64", ms=1.0), row("cold", first_s=1.0, second_ms=1.0)]
    [growth] = growths(rows)
    assert growth.ns == {512: 8e6 / 16384, 2048: 16e6 / 16384, 16384: 32e6 / 16384} and growth.ratio == 4
    assert growth.peak[512] == 64


def test_a_record_becomes_tables_and_a_picture_of_growth(tmp_path):
    shapes = "32x512-d64", "8x2048-d64", "2x8192-d64", "1x16384-d64"
    rows = [row(kind, shape=s, who=who, ms=4.0) for s in shapes for who in CASES["titans"].who for kind in ("forward", "both")]
    rows[0]["ms"] = 1.0
    lact = row("forward", case="lact", shape="1x16384-h4-d256", ms=10.0, flops=2e12, matmul_ms=4.0, note="path dual")
    op = row("forward", case="ttt_linear", ms=3.0, floor_ms=1.5, note="path dual")
    assert output.write(tmp_path, [RUN, *rows, lact, op]) == ["table.md", "results.json", "growth.png"]
    text = (tmp_path / "table.md").read_text()
    assert "700 TFLOP/s" in text and f"- titans: {CASES['titans'].remark}" in text and "- delta" not in text
    sheets = {sheet.title.split(",")[0]: sheet for sheet in tables.sheets([*rows, lact, op])}
    assert list(sheets) == ["Sequences", "Layers", "Growth with T at as many tokens in all"]
    assert [line[:3] for line in sheets["Sequences"].lines] == [("ttt_linear", "8x2048-d64", "ttr")]
    assert sheets["Layers"].lines[-1][3:7] == ("10.000", "", "200", "0.40") and sheets["Layers"].lines[-1][-1] == "path dual"
    growth = sheets["Growth with T at as many tokens in all"]
    assert growth.lines[0] == ("titans", "fwd", "16384", "ttr", "61.0", *3 * ("244.1",), "4.00", "")
    for sheet in sheets.values():
        assert {len(line) for line in sheet.lines} == {len(sheet.columns)}
        tables.rich_table(sheet)


def test_everybody_has_a_colour_and_a_name_in_the_pictures():
    assert set(COLOURS) == set(LABELS) == set(WHOS)
    assert {peers.peer_of(who) for who in WHOS} == {"ttr", *peers.PEERS}
