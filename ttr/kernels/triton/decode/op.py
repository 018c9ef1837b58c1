"""`ttr::scalar_gate_step`, importable without triton: one token of the scalar-gate family, the state updated in place."""

from __future__ import annotations

import torch

from ..operators import operator


def _step(*args):
    from .run import step_in_place

    return step_in_place(*args)


def _fake(q, k, v, *rest):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


operator(
    "scalar_gate_step(Tensor q, Tensor k, Tensor v, Tensor? step, Tensor? log_decay, Tensor(a!) state, float step_number, "
    "float log_decay_number, float gain, float eps, float scale, bool erase, bool look_before, bool read_before, str rule) -> Tensor",
    _step, _fake, tags=(torch.Tag.pt2_compliant_tag,),
)  # fmt: skip
