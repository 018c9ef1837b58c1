"""One call of `ttr.regress` straight on the kernels, in the configuration and the segments that the test chooses.

Every buffer the launches make comes filled with NaN, so a result that reads what nobody wrote is not finite.
"""

from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from unittest import mock

import torch

from ttr import testing
from ttr.inner_loop import complete_state
from ttr.kernels.triton.configs import Config, Launch
from ttr.kernels.triton.scalar_gate import plan, run
from ttr.objectives import slopes


def config(chunk: int = 16, every: int = 1, tile: int = 16, warps: int = 4, stages: int = 1, **launches: Launch) -> Config:
    """One launch for every kernel but those named."""
    numbers = {"chunk": chunk, "every": every}
    names = [f.name for f in fields(Config) if f.name not in numbers]
    return Config(**numbers, **{name: launches.get(name, Launch(tile, warps, stages)) for name in names})


@contextmanager
def poisoned():
    """Fresh memory is NaN (the largest integer where it holds integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, weight, initial, *rest):
        cu_seqlens, scale, rule, config, segments = rest
        with poisoned():
            o, last, saved = run.forward(
                q, k, v, log_decay, weight, initial, cu_seqlens, scale, rule, config, segments, any(ctx.needs_input_grad)
            )
        ctx.save_for_backward(q, k, v, log_decay, weight, initial, cu_seqlens, saved)
        ctx.rest = scale, rule, config, segments
        return o, last

    @staticmethod
    def backward(ctx, do, dlast):
        *inputs, saved = ctx.saved_tensors
        with poisoned():
            got = run.backward(do.contiguous(), dlast, *inputs, saved, *ctx.rest)
        summed = [g.flatten(0, -2).sum(0) if g is not None and x.ndim == 1 else g for g, x in zip(got, inputs, strict=False)]
        return *summed, None, None, None, None, None


def rule_of(spec) -> plan.Rule:
    return plan.Rule(slopes(spec.objective, 1)[0] != 0, spec.gate.order == "coupled", spec.read.at == "before")


def call(inputs: testing.Inputs, path: object = None, *, config: Config, segments: int):
    """As `testing.call`; step rules and fixed gates stay torch's, as they are no part of the kernels."""
    x, spec = inputs.tensors, inputs.spec
    Hv, dk = x["v"].shape[-2], x["k"].shape[-1]
    weight = x.get("step")
    if weight is None and spec.signals()["step"].value != 1.0:
        weight = x["v"].new_full((Hv,), spec.signals()["step"].value, dtype=torch.float32)
    if spec.optimizer.step_rule.kind != "plain":
        keys = x["k"].repeat_interleave(Hv // x["k"].shape[-2], -2)[..., None].float()
        weight = torch.ones(keys.shape[:-2], device=keys.device) if weight is None else weight
        weight = spec.optimizer.step_rule.effective(weight.float()[..., None, None], keys, slopes(spec.objective, 1)[0])[..., 0, 0]
    decay = x.get("log_decay")
    if decay is None and spec.gate.kind == "fixed":
        decay = spec.gate.log_decay({}, n_heads=Hv, params=inputs.params).to(x["v"].device)
    number = (None if n is None else n.float() for n in (decay, weight, inputs.initial_state))
    o, last = Kernels.apply(
        x["q"], x["k"], x["v"], *number, inputs.cu_seqlens, spec.scale(dk), rule_of(spec), config, segments
    )  # fmt: skip
    return o, complete_state(spec, {"W": last}, dk, x["v"].shape[-1])


def evaluate(inputs: testing.Inputs, config: Config, segments: int = 1, gradients: bool = True) -> dict[str, torch.Tensor]:
    """Outputs, final state and the gradient of every input, named as by `testing.evaluate`."""
    with mock.patch.object(testing, "call", partial(call, config=config, segments=segments)):
        return testing.evaluate(inputs, gradients=gradients)


def in_dtype(inputs: testing.Inputs, dtype: torch.dtype, device: str = "cpu") -> testing.Inputs:
    """q, k, v in dtype; signals and the state in float32, where a rounded gradient would hide an error."""
    case = inputs.to(torch.float32).to(device)
    return replace(case, tensors={n: t.to(dtype) if n in ("q", "k", "v") else t for n, t in case.tensors.items()})


def check_some_gradients(case: testing.Inputs) -> None:
    """The kernels give an input the same gradient where no other one's is wanted."""
    full, alone = {}, {}
    for name in (None, *case.tensors):
        x = {n: t.detach().requires_grad_(name in (None, n)) for n, t in case.tensors.items()}
        o, _ = testing.call(replace(case, tensors=x), "triton")
        got = torch.autograd.grad(o.square().sum(), [t for t in x.values() if t.requires_grad])
        (full if name is None else alone).update(zip(case.tensors if name is None else (name,), got, strict=True))
    for name, got in alone.items():
        assert torch.equal(got, full[name]), name
