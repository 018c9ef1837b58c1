"""`ttr::scalar_gate_step`, importable without triton: one token of the scalar-gate family, the state updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("ttr", "FRAGMENT")
library.define(
    "scalar_gate_step(Tensor q, Tensor k, Tensor v, Tensor? step, Tensor? log_decay, Tensor(a!) state, float step_number, "
    "float log_decay_number, float gain, float eps, float scale, bool erase, bool look_before, bool read_before, str rule) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _step(q: Tensor, k: Tensor, v: Tensor, step: Tensor | None, log_decay: Tensor | None, state: Tensor, *options) -> Tensor:
    from .run import step_in_place

    if state.is_cuda and state.device.index != torch.cuda.current_device():  # triton launches on the current device
        with torch.cuda.device(state.device):
            return step_in_place(q, k, v, step, log_decay, state, *options)
    return step_in_place(q, k, v, step, log_decay, state, *options)


def _fake(q: Tensor, k: Tensor, v: Tensor, step: Tensor | None, log_decay: Tensor | None, state: Tensor, *options) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


for _key in ("CUDA", "CPU"):  # on the CPU: Triton's interpreter
    library.impl("scalar_gate_step", _step, _key)
torch.library.register_fake("ttr::scalar_gate_step", _fake, lib=library)
