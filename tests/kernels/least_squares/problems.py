"""Problems of least squares in float64, and what a path makes of one: outputs, final state, every gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F

import ttr
from ttr.kernels.problem import Problem
from ttr.kernels.torch import least_squares

N, H, DK, DV = 2, 2, 5, 3
EXTREME = (0.0, -1e-3, -30.0, -100.0, -float("inf"), -0.1, -0.5)
CG = {"kind": "cg", "iterations": 12}
SPECS = {
    f"{name}-{gate}-{'decaying' if decays else 'constant'}-{at}": {
        "regressor": {"kind": "least_squares", "ridge_decays": decays},
        "optimizer": optimizer,
        "gate": gate,
        "read": at,
    }
    for (name, optimizer), gate, decays, at in itertools.product(
        {"cg": CG, "few": {"kind": "cg", "iterations": 2}, "cholesky": "cholesky", "rls": "rls"}.items(),
        ("none", "scalar", "vector"), (False, True), ("after", "before"),
    )
    if not (name == "rls" and gate != "none" and not decays) and not (gate == "none" and decays)
}  # fmt: skip
SOME = [name for name in SPECS if name.endswith("after") and "few" not in name]


class Draw:
    """Normal float64 numbers from one seeded stream."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def choice(self, values, *shape: int) -> torch.Tensor:
        values = torch.tensor(values, dtype=torch.float64)
        return values[torch.randint(len(values), shape, generator=self.generator)]


def make(spec, T: int, *, seed: int = 0, extreme: bool = False, started: bool = True, dk: int = DK, dv: int = DV) -> Problem:
    """A problem in float64; `started` gives it a memory of earlier tokens."""
    spec, draw = ttr.spec(spec), Draw(seed)
    params = {"ridge": draw(H, dk)}
    log_decay = None
    if spec.gate.kind != "none":
        shape = N, H, T, dk if spec.gate.per_key else 1
        log_decay = draw.choice(EXTREME, *shape) if extreme else -0.2 * draw(*shape).exp()
    state = least_squares.initial_state(spec, params, N, H, dk, dv, torch.float64, "cpu")
    if started:
        A, weights = draw(N, H, dk, dk), dict(state.weights)
        weights["P" if "P" in weights else "H"] = A @ A.mT + torch.eye(dk, dtype=torch.float64)
        weights["W" if "W" in weights else "G"] = draw(N, H, dk, dv)
        if "ridge_scale" in weights:
            weights["ridge_scale"] = draw(N, H, dk).sigmoid()
        state = replace(state, weights=weights)
    return Problem(
        spec=spec, q=draw(N, H, T, dk), k=F.normalize(draw(N, H, T, 1, dk), dim=-1), v=draw(N, H, T, 1, dv), write_key=None,
        signals={"weight": draw(N, H, T, 1, 1, 1).sigmoid()}, log_decay=log_decay, params=params, state=state, lengths=None,
    )  # fmt: skip


def leaves(problem: Problem) -> dict[str, torch.Tensor]:
    out = {"q": problem.q, "k": problem.k, "v": problem.v, "weight": problem.signals["weight"], "ridge": problem.params["ridge"]}
    if problem.log_decay is not None:
        out["log_decay"] = problem.log_decay
    return out | {f"initial {name}": w for name, w in problem.state.weights.items()}


def with_leaves(problem: Problem, x: dict[str, torch.Tensor]) -> Problem:
    weights = {name: x[f"initial {name}"] for name in problem.state.weights}
    return replace(
        problem, q=x["q"], k=x["k"], v=x["v"], signals={"weight": x["weight"]}, params={"ridge": x["ridge"]},
        log_decay=x.get("log_decay"), state=replace(problem.state, weights=weights),
    )  # fmt: skip


def everything(run, problem: Problem) -> dict[str, torch.Tensor]:
    """Outputs, final state, and the gradient of a random scalar of both with respect to every input."""
    x = {name: t.detach().clone().requires_grad_() for name, t in leaves(problem).items()}
    o, state = run(with_leaves(problem, x))
    results = {"o": o, **{f"final {name}": w for name, w in state.weights.items()}}
    draw = Draw(7)
    scalar = sum((draw(*t.shape) * t).sum() for t in results.values())
    grads = torch.autograd.grad(scalar, list(x.values()), allow_unused=True, materialize_grads=True)
    return {name: t.detach() for name, t in results.items()} | {f"d {name}": g for name, g in zip(x, grads, strict=True)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].shape == value.shape, name
        assert torch.isfinite(left[name]).all(), name
        error = (left[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-9) -> None:
    same({"value": left}, {"value": right}, tolerance)


def chunk(size: int):
    return lambda problem: least_squares.chunk(problem, chunk_size=size)


def ridge(problem: Problem) -> torch.Tensor:
    return F.softplus(problem.params["ridge"]) + problem.spec.regressor.ridge_floor
