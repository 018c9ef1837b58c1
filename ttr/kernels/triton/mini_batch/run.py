"""The launches of one call, forward and backward."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ..launch import Bound, prepare
from ..shapes import power_of_two
from . import masks
from .advance import advance_kernel
from .outputs import outputs_kernel
from .outputs_gradient import outputs_gradient_kernel
from .retreat import retreat_kernel
from .written_gradient import written_gradient_kernel

SCANS = {"advance": advance_kernel, "retreat": retreat_kernel}
READS = {"outputs": outputs_kernel, "outputs_gradient": outputs_gradient_kernel}
ROOM = 128 * 1024  # bytes of shared memory for what a scan has read ahead


class Form(NamedTuple):
    """Tokens of a mini-batch, the layer and the loss: f(x) = [x +] [LN](x Z + c), dl/df = curvature f - gain v; who reads when."""

    size: int
    residual: bool
    eps: float
    curvature: float
    gain: float
    before: bool


form_of = cache(Form)


class Kind(NamedTuple):
    """All that decides the launches of a call."""

    N: int
    T: int
    H: int
    HV: int
    dk: int
    dv: int
    size: int
    slots: int
    biased: bool
    norm: bool
    residual: bool
    before: bool
    masked: bool  # these four and the norms: which arguments are None
    factored: bool
    mixed: bool
    ended: bool
    dtype: torch.dtype
    device: int

    @property
    def batches(self) -> int:
        return self.T // self.size


def kind_of(q, v, slots: int, mask, factor, gamma, first_bias, form: Form, mixed: bool, ended: bool) -> Kind:
    (N, T, H, dk), (HV, dv) = q.shape, v.shape[2:]
    return Kind(
        N, T, H, HV, dk, dv, form.size, slots, first_bias is not None, gamma is not None, form.residual, form.before,
        mask is not None, factor is not None, mixed, ended, q.dtype, q.get_device(),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def launches(kind: Kind) -> dict[str, Bound]:
    constants: dict[str, Any] = {
        "H": kind.H, "HV": kind.HV, "DK": kind.dk, "DV": kind.dv, "BK": power_of_two(kind.dk), "BV": power_of_two(kind.dv),
        "SIZE": kind.size, "ROWS": max(16, power_of_two(kind.size)), "SLOTS": kind.slots, "BIASED": kind.biased, "NORM": kind.norm,
        "RESIDUAL": kind.residual, "PRECISION": "tf32x3" if kind.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    rows, wide = constants["ROWS"], kind.slots * kind.dk * kind.dv > 64 * 64
    heads, batches = (kind.N * kind.HV,), (kind.N * kind.batches, kind.HV)
    narrow, reads = (2 if rows == 16 else 4) << wide, {**constants, "BEFORE": kind.before}
    out = {name: kernel.bind(batches, narrow, **reads) for name, kernel in READS.items()}
    out["written_gradient"] = written_gradient_kernel.bind(batches, 8 if wide else narrow, **constants)
    for name, kernel in SCANS.items():
        read = rows * ((kind.dk + kind.dv), (2 * kind.dk + 5 * kind.dv))[name == "retreat"]  # of 5, 2 for a float32
        stages = min(3, max(1, ROOM // (read * kind.dtype.itemsize)))
        out[name] = kernel.bind(heads, 4 << wide, STAGES=stages, **constants)
    return out


def forward(q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, form: Form):
    """o, the last slots and their biases, the slots and biases every mini-batch began with, and its gradients."""
    if q.is_cuda:
        prepare()
    if masks.are_numbers(written):
        mask, rows, written, kept = masks.forward(written, form.size, form.before)
    kind = kind_of(q, v, first.shape[2], mask, factor, gamma, first_bias, form, False, False)
    run, (N, T, _, HV, dk, dv, _, r), M = launches(kind), kind[:8], kind.batches
    bias = (lambda *shape: q.new_empty(shape, dtype=torch.float32)) if kind.biased else (lambda *shape: None)
    starts, start_biases = q.new_empty(N, M, HV, r, dk, dv), bias(N, M, HV, r, dv)
    gradient, o, last, last_bias = torch.empty_like(v), torch.empty_like(v), torch.empty_like(first), bias(N, HV, r, dv)
    run["advance"](
        k, v, mask, written, kept, factor, gamma, beta, first, first_bias, starts, start_biases, gradient, last, last_bias,
        T, M, form.eps, form.curvature, form.gain,
    )  # fmt: skip
    run["outputs"](q, k, gradient, mask, rows, written, factor, gamma, beta, starts, start_biases, o, T, M, form.eps)
    return o, last, last_bias, starts, start_biases, gradient


def backward(
    do, dlast, dlast_bias, q, k, v, mask, rows, written, kept, factor, gamma, beta, first, first_bias, starts, start_biases, gradient,
    form: Form, mixed: bool = True,
):  # fmt: skip
    """Of q, k, v, mask, rows, written, kept, factor, gamma, beta, first and first_bias; None for what was not given.

    mixed: whether that of kept is wanted, and of the numbers, if they were given.
    """
    if q.is_cuda:
        prepare()
    numbers = written if masks.are_numbers(written) else None
    if numbers is not None:
        mask, rows, written, kept = masks.forward(numbers, form.size, form.before)
    mixed = kept is not None and mixed
    kind = kind_of(q, v, first.shape[2], mask, factor, gamma, first_bias, form, mixed, dlast is not None)
    run, (N, T, H, HV, dk, dv, *_), M = launches(kind), kind[:8], kind.batches
    dq, dk_ = (q.new_empty(N, T, HV, dk) for _ in range(2))
    dy, dgradient, dlayer, dv_ = (torch.empty_like(v) for _ in range(4))
    dmask, drows, dwritten = (None if x is None else torch.empty_like(x) for x in (mask, rows, written))
    dkept = torch.empty_like(kept) if mixed and kept is not None else None
    # by what every mini-batch reads, and by the loss of all of them
    dgamma, dbeta = (None if gamma is None else q.new_empty(N, M + 1, HV, dv, dtype=torch.float32) for _ in range(2))
    dfactor = None if factor is None else q.new_empty(N, M, HV, form.size, dtype=torch.float32)
    normals = (q.new_empty(N, T, HV, dv, dtype=torch.float32), None if gamma is None else q.new_empty(N, T, HV, dtype=torch.float32))
    read, affine, slots = (mask, rows, written), (factor, gamma, beta), (starts, start_biases)
    run["outputs_gradient"](
        q, k, gradient, *read, *affine, *slots, do, dy, dq, dk_, dgradient, dmask, drows, dwritten, dfactor, dgamma, dbeta,
        *normals, T, M, form.eps,
    )  # fmt: skip
    ends, dfirst = torch.empty_like(starts), torch.empty_like(first)
    end_biases, dfirst_bias = (torch.empty_like(start_biases), torch.empty_like(first_bias)) if kind.biased else (None, None)
    run["retreat"](
        q, k, v, *read, kept, *affine, *normals, dy, dgradient, dlast, dlast_bias, ends, end_biases, dlayer, dv_,
        dgamma, dbeta, dfirst, dfirst_bias, T, M, form.curvature, form.gain,
    )  # fmt: skip
    run["written_gradient"](
        k, mask, written, factor, gradient, *slots, ends, end_biases, dlayer, dv_, dk_, dwritten, dkept, dfactor,
        T, M, form.curvature / form.gain,
    )  # fmt: skip
    if numbers is not None:
        dwritten = masks.backward(dmask, drows, dwritten, dkept, numbers, form.size, form.before) if mixed else None
        dmask = drows = dkept = None
    dfactor, dgamma, dbeta = (None if x is None else x.sum((0, 1)) for x in (dfactor, dgamma, dbeta))
    if HV != H:
        dq, dk_ = (x.unflatten(2, (H, HV // H)).sum(3) for x in (dq, dk_))
    return dq, dk_, dv_, dmask, drows, dwritten, dkept, dfactor, dgamma, dbeta, dfirst, dfirst_bias
