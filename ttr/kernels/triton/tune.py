"""`ttr.tune`: find tile sizes, warps and stages for one shape class on this GPU, and keep them in the user's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...choice import select_path
from ...spec import Spec
from ...spec import spec as read_spec
from . import configs
from .configs import Arch, Config, Launch, ShapeClass
from .eligible import capability_of, plan_of, why_not_chunks
from .shapes import steps_of

# what is tried for every field in turn, the others held at the best so far
# (not `every`, which trades memory for accuracy; and no tile under 64: Triton 3.6 compiles those to illegal accesses on Hopper)
NUMBERS = {"chunk": (32, 64)}
TILES, WARPS, STAGES = (64, 128), (2, 4, 8), (1, 2, 3)
# how far another configuration's results may lie from the table's own, relative to the largest number of each
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-3}


def tune(
    spec: str | Mapping | Spec, *, B: int, T: int, H: int, dk: int, dv: int, Hv: int | None = None,
    dtype: torch.dtype = torch.bfloat16, report: Callable[[str], Any] = print,
) -> dict[str, Any]:  # fmt: skip
    """Time configurations of path='triton' for a declaration's shape class on the current GPU and store the fastest.

    The class is the declaration's rule (erase or not), dk and dv rounded up to a power of two, and the bytes of dtype; B,
    T, H and Hv (H if None) are those of the call that is timed, forward and backward together. Field by field of the
    configuration the grid NUMBERS, or TILES x WARPS x STAGES, is tried; each candidate must first give the outputs and
    gradients of the table's own configuration within BOUNDS (a wrong one, or one that does not compile, is reported and
    dropped). Takes minutes, most of them compiling. After each field the best so far is written to
    $TTR_KERNEL_CONFIGS, or ~/.cache/ttr/kernels.json, and used from then on by this process and later ones.

    report: is given one line a field. Returns the row as plain data. Raises ValueError where the kernels do not serve.
    """
    Hv = H if Hv is None else Hv
    for name, value in {"B": B, "T": T, "H": H, "Hv": Hv, "dk": dk, "dv": dv}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if dtype not in BOUNDS:
        raise ValueError(f"dtype={dtype!r}: choose from {[str(known) for known in BOUNDS]}")
    spec, device = read_spec(spec), _device()
    select_path(spec, path="triton", device=device.type, dtype=dtype, dk=dk, dv=dv, capability=capability_of(device))
    if Hv % H:
        raise ValueError(f"Hv={Hv}: expected a multiple of H={H}")
    if spec.mini_batch != 1:
        raise ValueError(f"optimizer.mini_batch={spec.mini_batch}: the kernels over mini-batches have no table of configurations")
    if spec.regressor.family == "least_squares":
        raise ValueError("regressor='least_squares': the kernels of the solve have no table of configurations")
    if (why := why_not_chunks(spec)) is not None:
        raise ValueError(f"{why}: the kernel of one event at a time has no table of configurations")
    plan, arch = plan_of(spec, dv), configs.arch_of(device)
    if plan.by_channel:
        raise ValueError(f"gate {spec.gate.kind!r}: the kernels of one decay a key channel have no table of configurations")
    width = dv + plan.pad
    call = _Call(spec, B, T, H, Hv, dk, width, dtype, device)
    best = configs.config_for(arch, plan.erase, dk, width, dtype)
    shortest, expected = call.time(best), call.results(best)
    report(f"{arch} {ShapeClass.of(plan.erase, dk, width, dtype)}: {shortest:.3f} ms from the table")
    for name in (f.name for f in fields(Config)):
        dropped = []
        for candidate in _candidates(best, name, dk, width):
            try:
                wrong = _wrong(call.results(candidate), expected, BOUNDS[dtype])
                took = call.time(candidate) if wrong is None else float("inf")
            except Exception as error:  # too large for the GPU, or a fault of the compiler
                wrong, took = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", float("inf")
            if wrong is not None:
                dropped.append(f"{getattr(candidate, name)}: {wrong}")
            if took < shortest:
                best, shortest = candidate, took
        report("\n  ".join([f"{name}: {shortest:.3f} ms with {getattr(best, name)}", *(f"dropped {x}" for x in dropped)]))
        _store(arch, ShapeClass.of(plan.erase, dk, width, dtype), best, device)
    return configs.to_json(best)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _candidates(best: Config, name: str, dk: int, dv: int) -> Iterator[Config]:
    """Every other value of a field. A tile of 0 means that the kernel has none."""
    now = getattr(best, name)
    if not isinstance(now, Launch):
        values = NUMBERS.get(name, ())
    else:
        tiles = [tile for tile in TILES if tile <= max(dk, dv, 64)] if now.tile else [0]
        values = [Launch(*x) for x in product(tiles, WARPS, STAGES)]
    yield from (replace(best, **{name: value}) for value in values if value != now)


def _wrong(got: list[Tensor], expected: list[Tensor], bound: float) -> str | None:
    for x, y in zip(got, expected, strict=True):
        error = ((x.float() - y.float()).abs().max() / y.float().abs().max().clamp_min(1e-6)).item()
        if not error <= bound:
            return f"off by {error:.1e}, allowed {bound:.0e}"
    return None


class _Call:
    """One call of the kernels, forward and backward, with any configuration."""

    def __init__(self, spec: Spec, B: int, T: int, H: int, Hv: int, dk: int, dv: int, dtype: torch.dtype, device: torch.device):
        from .scalar_gate import run
        from .scalar_gate.plan import Rule

        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        plan, self.run = plan_of(spec, dv), run
        events = (B, T, spec.steps) if spec.steps > 1 else (B, T)
        self.q, self.do, self.v = (normal(*x).to(dtype) for x in ((B, T, H, dk), (B, T, Hv, dv), (*events, Hv, dv)))
        self.k = torch.nn.functional.normalize(normal(*events, H, dk), dim=-1).to(dtype)
        self.log_decay = None if not spec.gate.decays else -0.1 * normal(B, T, Hv).abs()
        self.weight = None if spec.optimizer.step.value == 1.0 else normal(*events, Hv).sigmoid()
        self.rule = Rule(plan.erase, plan.look_before, plan.read_before)
        self.arch = configs.arch_of(device)

    def results(self, config: Config) -> list[Tensor]:
        B, T, Hv, dv = self.do.shape
        segments = configs.segments_of(self.arch, config, B * Hv, dv, T * steps_of(self.v))
        given = (self.q, self.k, self.v, self.log_decay, self.weight, None, None)
        o, last, saved = self.run.forward(*given, 0.1, self.rule, config, segments, True)
        gradients = self.run.backward(self.do, None, *given, saved, 0.1, self.rule, config, segments)
        return [o, last, *(x for x in gradients if x is not None)]

    def time(self, config: Config) -> float:
        """Milliseconds on the GPU: the launches of a CUDA graph, without the time that Python takes to make them."""
        if not self.q.is_cuda:
            raise RuntimeError("ttr.tune times kernels on a CUDA device, and there is none")
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(lambda: self.results(config), return_mode="median"))  # type: ignore[arg-type]


def _store(arch: str, row: ShapeClass, config: Config, device: torch.device) -> None:
    file = configs.user_file()
    try:
        own = configs.read_table(file.read_text()) if file.is_file() else {}
    except ValueError:  # of another version: `configs.table` has warned
        own = {}
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    known = own.get(arch, Arch(count, {}))
    own[arch] = Arch(known.multiprocessors, {**known.rows, row: config})
    configs.write_table(own, file)
    configs.forget()
