"""The mechanisms that are measured."""

from __future__ import annotations

from experiments.bench import flops
from experiments.bench.layers import Layer
from experiments.bench.linear import Linear
from experiments.bench.shapes import LACT, NONLINEAR, NONLINEAR_MORE
from experiments.bench.ttt_linear import MINI_BATCH, TTTLinear

CASES = {
    case.name: case
    for case in (
        Linear(
            name="simple_gla",
            title="scalar decay (simple GLA)",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "objective": "dot", "optimizer": {"kind": "sgd", "step": 1.0}, "gate": "scalar"},
            log_decay=True,
        ),
        Linear(
            name="gated_delta",
            title="gated delta rule",
            who=("ttr", "fla", "flash_qla"),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": {"kind": "scalar", "order": "first"}},
            step=True,
            log_decay=True,
            unit_keys=True,
        ),
        Linear(
            name="delta",
            title="delta rule",
            who=("ttr", "fla"),
            declaration={"regressor": "linear", "optimizer": "delta", "gate": "none"},
            step=True,
            unit_keys=True,
        ),
        Linear(name="sdpa", title="causal softmax attention", who=("torch",)),
        TTTLinear(
            name="ttt_linear",
            title="TTT-Linear (inner loop)",
            who=("ttr", "fla", "fla-fused"),
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
            who=("ttr", "titans_pytorch", "titans_pytorch-b64"),
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
            who=("ttr",),
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
