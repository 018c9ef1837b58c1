"""What the Triton kernels serve, decided without triton: declarations and machines (sizes: `sizes`)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

from ...constant import constant
from ...objectives import slopes

LEAST_MINI_BATCH, LARGEST_MINI_BATCH = 16, 64  # tokens of one
HIDDEN = "gelu", "gelu_tanh", "silu", "relu", "tanh"  # the activations of `two_layers.activations`
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (9, 0)


class Plan(NamedTuple):
    """How the kernels run a declaration: S <- decay S + (weight k) (v - S k), the bracket without S unless `erase`.

    erase: the delta rule. look_before: the error is taken at the undecayed state. read_before: the query reads before the
    token's update. factor: weight = factor step. curvature: what the step rule is told. pad: channels that v grows by, the
    normaliser's among them. by_channel: the plan of `vector_gate`.
    """

    erase: bool
    look_before: bool
    read_before: bool
    factor: float
    curvature: float | None
    pad: int
    zero: bool
    by_channel: bool


@constant
def plan_of(spec, dv: int) -> Plan:
    """Of a declaration for which `why_not_chunks` is None."""
    curvature, gain = slopes(spec.objective, dv)
    erase, init = curvature != 0, spec.regressor.init(16, 16)["W"]
    return Plan(
        erase=erase, look_before=erase and spec.gate.decays and spec.gate.order == "coupled",
        read_before=spec.read.at == "before", factor=curvature if erase else gain,
        curvature=None if spec.optimizer.step_rule.kind == "plain" else curvature,
        pad=pad_of(spec, dv), zero=not (init.learned or init.value or init.std), by_channel=by_channel(spec),
    )  # fmt: skip


@constant
def by_channel(spec) -> bool:
    """Whether something of a linear declaration differs from key channel to key channel, or is written with keys of its own."""
    return spec.gate.per_key or spec.separate_write_key or any(s.per == "key" and not s.constant for s in spec.signals().values())


def pad_of(spec, dv: int) -> int:
    """Channels that v grows by: the normaliser's ones or a ridge's scale, and up to the kernels' multiple of 16."""
    from ...least_squares import carries_scale

    more = carries_scale(spec) if spec.regressor.family == "least_squares" else spec.read.normalizer != "none"
    return 16 - dv % 16 if more else 0


@constant
def in_float32(spec) -> bool:
    """Whether the kernels compute in float32 whatever comes: one event at a time, least squares solved exactly, or with a ridge that
    is forgotten, which leaves a badly conditioned matrix."""
    from ...least_squares import ridge_decays
    from ...lowering import is_linear

    if spec.regressor.family == "least_squares":
        return spec.optimizer.kind != "cg" or ridge_decays(spec)
    return spec.regressor.family == "trained" and is_linear(spec) and why_not_chunks(spec) is not None


@constant
def why_not_triton(spec) -> str | None:
    """The reason for which no kernel serves a declaration, or None when one does."""
    from ...choice import why_nonlinear
    from ...lowering import is_linear

    if spec.regressor.family == "least_squares":
        return None
    if spec.regressor.family != "trained":
        return f"regressor {spec.regressor.kind!r} has paths of its own"
    if spec.mini_batch != 1:
        return _why_not_mini_batches(spec)
    return None if is_linear(spec) else why_nonlinear(spec)


@constant
def why_not_chunks(spec) -> str | None:
    """The reason for which no kernel over chunks serves a linear recurrence, which then runs one event at a time (`recurrent`)."""
    slots = spec.optimizer.slots
    if len(slots) > 1:
        return f"optimizer {spec.optimizer.kind!r} carries {len(slots)} more slots; the kernels over chunks carry one beside the weights"
    if slots and spec.steps > 1:
        return f"optimizer.steps={spec.steps} with a slot beside the weights: the kernels over chunks take one step a token there"
    if by_channel(spec) and (slots or spec.steps > 1):
        more = f"optimizer.steps={spec.steps}" if spec.steps > 1 else f"optimizer {spec.optimizer.kind!r} carries a slot beside the weights"
        return f"{more}, and a gate, a step or a write key of every key channel's own; the kernels over chunks take one of both"
    for name, s in spec.signals().items():
        if s.per not in (("head",) if slots else ("head", "key")):
            return f"{name} is per {s.per}; the kernels over chunks take one number a head or a key channel"
    if slots:  # whatever it is: the kernels take the numbers that are probed of it
        return _why_not_objective(spec)
    return why_not_plain(spec)


def _why_not_mini_batches(spec) -> str | None:
    """The same for mini-batches of frozen gradients (`mini_batch`)."""
    from ...choice import why_not_dual
    from ...lowering import any_signals, coefficients

    optimizer, size = spec.optimizer, spec.mini_batch
    if (why := why_not_dual(spec)) is not None:
        return why
    if optimizer.accumulate:
        return "optimizer.accumulate=true steps once per mini-batch; the kernels take linear optimizers that step at every token"
    if not predicts_as_its_layers(spec.regressor):
        return f"regressor {spec.regressor.kind!r} is not one linear layer or two with an activation between them, with or without a norm"
    if not isinstance(size, int) or not LEAST_MINI_BATCH <= size <= LARGEST_MINI_BATCH:
        return (
            f"optimizer.mini_batch={size!r}; the kernels take {LEAST_MINI_BATCH} to {LARGEST_MINI_BATCH} tokens "
            "(they keep the weights that each mini-batch begins with)"
        )
    if spec.read.normalizer != "none":
        return f"read.normalizer={spec.read.normalizer!r}: over mini-batches the kernels do not count"
    if not spec.objective.quadratic:
        return f"the gradient of objective {spec.objective.kind!r} is not affine in the prediction"
    if not slopes(spec.objective, 3)[1]:
        return f"objective {spec.objective.kind!r} has a gradient that its target does not enter"
    if spec.window > 1:
        return f"objective.window={spec.window} takes the gradient of several pairs at once"
    if not optimizer.mirror.identity:
        return f"mirror {optimizer.mirror.kind!r} maps the weights before they predict"
    if spec.steps > 1 or len(optimizer.slots) > 1:
        return f"optimizer {optimizer.kind!r}, steps={spec.steps}, {len(optimizer.slots)} slots; the kernels take 1 step, up to 1 slot"
    if optimizer.step_rule.kind != "plain":
        return f"optimizer.step_rule={optimizer.step_rule.kind!r}; with mini-batches the kernels take plain steps"
    lead = (64, 1)
    looks = coefficients(spec, any_signals(optimizer.signals(), *lead, 1, 1), None, lead, False).c
    if bool((looks[0] != 1).any()) or bool((looks[1:] != 0).any()):
        return f"optimizer {optimizer.kind!r} takes its gradient elsewhere than at the weights the mini-batch began with"
    return None


@constant
def predicts_as_its_layers(regressor) -> bool:
    """Probe that it predicts as its `layers` say: a class of somebody's own may have another predict."""
    from ...regressors.mlp import ACTIVATIONS

    said = regressor.layers()
    if said is None or said.activation not in (None, *HIDDEN):
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {name: draw(*init.shape) for name, init in regressor.init(3, 3).items()}
    inner = [w for name, w in weights.items() if name not in regressor.outer]
    x = draw(2, 3)
    depth = 1 if said.activation is None else 2
    if len(inner) not in (depth, 2 * depth):
        return False
    biased = len(inner) > depth
    expected = x @ inner[0] + (inner[1] if biased else 0)
    if said.activation is not None:
        expected = ACTIVATIONS[said.activation](expected) @ inner[1 + biased] + (inner[3] if biased else 0)
    if outer := [weights[name] for name in regressor.outer if name in weights]:
        expected = torch.nn.functional.layer_norm(expected, (3,), *outer, eps=said.eps)
    if len(outer) not in (0, 2):
        return False
    return torch.allclose(regressor.predict(weights, x), expected + x if said.residual else expected, rtol=1e-10, atol=1e-10)


def _why_not_objective(spec) -> str | None:
    curvature, gain = slopes(spec.objective, 3)
    if curvature < 0 or (curvature > 0 and gain != curvature):
        return f"objective {spec.objective.kind!r} is no multiple of 1/2||f(k) - v||^2 or -<f(k), v>"
    return None


@constant
def why_not_plain(spec) -> str | None:
    """The reason for which an optimizer of one slot is no plain step on the gradient, or None.

    Probed on signals of any sign and size: the gate alone must move the weights, the step alone the write.
    """
    from ...lowering import any_signal, coefficients

    others = sorted(spec.optimizer.signals().keys() - {"step"})
    if others:
        return f"optimizer {spec.optimizer.kind!r} has the signals {others} besides its step"
    if (why := _why_not_objective(spec)) is not None:
        return why
    lead = (64, 1)  # events, micro-steps
    step, keep = any_signal(*lead, 1, 1), torch.rand(*lead, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = spec.gate.order == "first"
    got = coefficients(spec, {"step": step}, keep, lead, first)
    one = torch.ones_like(keep)
    expected = {"A": keep[None, None], "b": -step[None], "c": (keep if first else one)[None], "read": one[None, :, 0]}
    for name, x in expected.items():
        if not torch.allclose(getattr(got, name), x, rtol=1e-12, atol=0):
            return f"optimizer {spec.optimizer.kind!r} is no plain step on the gradient (its {name} differs)"
    return None


def why_not_machine(device: str, capability: tuple[int, int] | None, dtype: torch.dtype | None = None) -> str | None:
    """The reason for which the kernels do not run on a device, or None."""
    if not has_triton():
        return "triton is not installed (pip install 'test-time-regression[triton]', Linux)"
    if device == "cpu":
        if not interpreted():
            return "the kernels run on CUDA devices (on a CPU in Triton's interpreter: TRITON_INTERPRET=1 before Python starts)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes wrong numbers in torch.bfloat16; choose torch.float32 or torch.float16 there"
        return None
    if device != "cuda" or torch.version.hip is not None:
        return f"the kernels run on NVIDIA GPUs, got device {'hip' if device == 'cuda' else device}"
    if capability is not None and capability < LEAST_CAPABILITY:
        return (
            f"the kernels need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, this GPU has {capability[0]}.{capability[1]}"
        )
    return None


@constant
def capability_of(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@constant
def interpreted() -> bool:
    """Whether triton was, or would be, imported for its interpreter."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
