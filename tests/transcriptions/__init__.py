"""Published recurrences, transcribed one token at a time; the oracles of the preset tests. Nothing here imports ttr.

Layout: q, k [B, T, H, dk], v [B, T, H, dv], signals [B, T, H] or with a channel axis; log_decay is a natural log.
The papers' S is [dv, dk] and predicts S k; the state returned is its transpose, [B, H, dk, dv].
"""

from .delta import (
    deltanet,
    deltaproduct,
    dplr,
    gated_deltanet,
    gated_deltaproduct,
    kda,
    longhorn,
    momentum_deltanet,
    rwkv7,
)
from .fast_weights import lact
from .hebbian import gla, lightning, linear_attention, linear_attention_unnormalised, mamba2, mlstm, retnet
from .least_squares import mesa, mesanet, rls
from .miras import memora, moneta, yaad
from .nonlinear import titans, ttt_linear, ttt_mlp
from .omega import atlas, omeganet
from .softmax import softmax, softmax_window

__all__ = [
    "atlas",
    "deltanet",
    "deltaproduct",
    "dplr",
    "gated_deltanet",
    "gated_deltaproduct",
    "gla",
    "kda",
    "lact",
    "lightning",
    "linear_attention",
    "linear_attention_unnormalised",
    "longhorn",
    "mamba2",
    "memora",
    "mesa",
    "mesanet",
    "mlstm",
    "momentum_deltanet",
    "moneta",
    "omeganet",
    "retnet",
    "rls",
    "rwkv7",
    "softmax",
    "softmax_window",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "yaad",
]
