"""One token, the state updated in place, importable without triton: `ttr::scalar_gate_step` of one pair with a number a head, and
`ttr::events_step` of several pairs, with numbers a channel or with keys to write with.
"""

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


def _events(*args):
    from .run import events_in_place

    return events_in_place(*args)


def _fake_events(q, k, v, *rest):
    return torch.empty((v.shape[0], *v.shape[2:]), dtype=v.dtype, device=v.device)


operator(
    "events_step(Tensor q, Tensor k, Tensor v, Tensor? write_key, Tensor? step, Tensor? log_decay, Tensor(a!) state, float step_number, "
    "float log_decay_number, float gain, float written, float eps, float scale, bool erase, bool look_before, bool read_before, str rule, "
    "str per, str decay_per) -> Tensor",
    _events, _fake_events, tags=(torch.Tag.pt2_compliant_tag,),
)  # fmt: skip
