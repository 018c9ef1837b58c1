"""The mechanisms that are measured."""

from __future__ import annotations

from experiments.bench import flops
from experiments.bench.case import COMPILED
from experiments.bench.layers import Layer
from experiments.bench.linear import Linear
from experiments.bench.shapes import DEFAULT, LACT, NONLINEAR, NONLINEAR_MORE
from experiments.bench.ttt_linear import MINI_BATCH, TTTLinear

GATED_DELTA = {"regressor": "linear", "optimizer": "delta", "gate": {"kind": "scalar", "order": "first"}}
CASES = {
    case.name: case
    for case in (
        Linear(
            name="simple_gla",
            title="scalar decay (simple GLA)",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "objective": "dot", "optimizer": {"kind": "sgd", "step": 1.0}, "gate": "scalar"},
        ),
        Linear(
            name="gated_delta",
            title="gated delta rule",
            who=("ttr", "fla", "flash_qla"),
            declaration=GATED_DELTA,
            unit_keys=True,
        ),
        Linear(
            name="delta",
            title="delta rule",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": "none"},
            unit_keys=True,
        ),
        Linear(
            name="gla",
            title="decay per key channel (GLA)",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "objective": "dot", "optimizer": {"kind": "sgd", "step": 1.0}, "gate": "vector"},
        ),
        Linear(
            name="kda",
            title="delta rule, decay per key channel (KDA)",
            who=("ttr", "fla", "fla-bounded"),
            notes={"fla-bounded": "safe_gate=True"},
            declaration={"regressor": "linear", "optimizer": "delta", "gate": {"kind": "vector", "order": "first"}},
            unit_keys=True,
        ),
        Linear(
            name="rwkv7",
            title="diagonal plus rank one (RWKV-7)",
            who=("ttr", "fla", "fla-bounded"),
            notes={"fla-bounded": "lower_bound=-0.61"},
            declaration={
                "regressor": "linear",
                "optimizer": {"kind": "delta", "step": {"map": "sigmoid", "per": "key"}, "write_key": "separate"},
                "gate": {"kind": "vector", "order": "coupled"},
                "read": {"at": "after", "scale": 1.0},
            },
            unit_keys=True,
            remark=(
                "fla-bounded is the same op, told that no log decay lies below a bound; ours takes any. Ours takes the key, a float32 "
                "rate for each of its channels and the key it writes with; fla's op takes -key and rate * key, made beforehand and in "
                "bf16. Queries are not scaled."
            ),
        ),
        Linear(
            name="deltaproduct2",
            title="gated delta product, 2 micro-steps",
            who=("ttr", "fla"),
            declaration={**GATED_DELTA, "optimizer": {"kind": "delta", "steps": 2, "pairs": "separate"}},
            unit_keys=True,
        ),
        Linear(
            name="momentum_delta",
            title="gated delta rule with momentum",
            who=("ttr", "fla", "ttr-gated_delta"),
            shapes=DEFAULT[:1],
            more=DEFAULT[1:],
            declaration={
                **GATED_DELTA,
                "optimizer": {"kind": "momentum", "nesterov": False, "step": "sigmoid", "momentum": "sigmoid"},
            },
            others={"ttr-gated_delta": GATED_DELTA},
            notes={"fla": "PyTorch operations, no kernel", "ttr-gated_delta": "our gated delta rule"},
            unit_keys=True,
            remark=(
                "the row ttr-gated_delta is our own gated delta rule on the same inputs, without the momentum: "
                "another function, so 'ours / it' says there what the second slot costs. Momenta are 0.82 on average: fla's op divides "
                "by their products over 64 tokens in float32, and from about 0.75 down its output is not that of its own recurrence."
            ),
        ),
        Linear(
            name="mesa",
            title="least squares by conjugate gradients (MesaNet)",
            who=("ttr", "fla"),
            shapes=DEFAULT[:1],
            more=DEFAULT[1:],
            declaration={"base": "mesanet"},
            unit_keys=True,
            remark=(
                "up to 30 conjugate-gradient steps a token. fla takes all of them, with 1e-5 added to its denominators; ours, at its "
                "tolerance of 0, stops a token whose residual is below what its dtype resolves (in 16 bits 2^-13 of its query), "
                "so its time depends on how well the keys condition the problem. Queries are not scaled."
            ),
        ),
        Linear(name="sdpa", title="causal softmax attention", who=("torch",)),
        TTTLinear(
            name="ttt_linear",
            title="TTT-Linear (inner loop)",
            who=("ttr", COMPILED, "fla", "fla-fused"),
            shapes=NONLINEAR,
            more=NONLINEAR_MORE,
            declaration={"base": "ttt_linear", "optimizer": {"position": "none", "mini_batch": MINI_BATCH}},
            remark=(
                "both write the same memory (gradients at the start of every 16 tokens, one rate for each 16 as fla's rate belongs to the "
                "reading token and ours to the written one); ours reads q + LN(q W + b) as published, fla's ops Z + LN(Z) with "
                "Z = q W + b. Compared is LN(Z), which both outputs give."
            ),
        ),
        Layer(
            name="titans",
            title="Titans' memory (layer)",
            who=("ttr", COMPILED, "titans_pytorch", "titans_pytorch-b64"),
            shapes=NONLINEAR,
            more=NONLINEAR_MORE,
            preset="titans",
            notes={"titans_pytorch": "gradients at the initial weights", "titans_pytorch-b64": "gradients at every 64 tokens' start"},
            remark=(
                "whole layers, two-layer MLP memories four times as wide as their heads, momentum, decay, 64 tokens a mini-batch. By "
                "default (batch_size=None) titans-pytorch takes every gradient at the sequence's initial weights; with batch_size=64, "
                "the row titans_pytorch-b64, at the start of every 64 tokens, as the paper and ours do. Momentum and decay are one number "
                "for 64 tokens there and one for each token here; queries there read weights up to 63 tokens old; ours has short "
                "convolutions and a gate for every channel besides. Different functions: outputs are not compared."
            ),
        ),
        Layer(
            name="lact",
            title="LaCT's fast weights (layer)",
            who=("ttr", COMPILED),
            shapes=LACT,
            preset="lact",
            operations=flops.lact,
            remark=(
                "whole layer, chunks of 2048 tokens, Muon; no peer. Operations by the formula in experiments/bench/flops.py, of the "
                "large matmuls alone, beside the rate of a large bf16 torch.matmul in the same run."
            ),
        ),
    )
}
WHOS = tuple(dict.fromkeys(who for case in CASES.values() for who in case.who))
