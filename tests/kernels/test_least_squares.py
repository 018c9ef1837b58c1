"""Least squares: every path against the definition, the definition against what is known of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ttr
from ttr.kernels.problem import Problem
from ttr.kernels.torch import least_squares
from ttr.kernels.torch.implicit_solve import conjugate_gradients

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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize(("name", "T"), [(name, T) for name in SPECS for T in (1, 15, 65) if T < 65 or name in SOME])
def test_paths_are_the_definition(name, T):
    problem = make(SPECS[name], T)
    expected = everything(least_squares.definition, problem)
    same(everything(least_squares.recurrent, problem), expected)
    for size in {1: [64], 15: [1, 5], 65: [64]}[T]:
        same(everything(chunk(size), problem), expected)


@pytest.mark.parametrize("name", [name for name in SPECS if "constant" in name and "none" not in name])
def test_extreme_gates(name):
    problem = make(SPECS[name], 24, extreme=True)
    expected = everything(least_squares.definition, problem)
    for run in (least_squares.recurrent, chunk(8), chunk(64)):
        same(everything(run, problem), expected)


@pytest.mark.parametrize("name", [name for name in SPECS if "decaying" in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forgotten_ridge_stays_finite(name, dtype):
    """What such a gate leaves of M is lost to rounding, so only finiteness can be asked."""
    problem = make(SPECS[name], 30, extreme=True)
    problem = with_leaves(problem, {name: t.to(dtype) for name, t in leaves(problem).items()})
    for run in (least_squares.recurrent, chunk(16)):
        for key, value in everything(run, problem).items():
            assert torch.isfinite(value).all(), key


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("split", [1, 16, 23])
def test_prefill_then_decode_is_one_pass(name, split):
    problem = make(SPECS[name], 25, started=False)

    def cut(p: Problem, part: slice, state=None) -> Problem:
        def at(x):
            return x[:, :, part]

        return replace(
            p, q=at(p.q), k=at(p.k), v=at(p.v), signals={"weight": at(p.signals["weight"])},
            log_decay=None if p.log_decay is None else at(p.log_decay), state=state or p.state,
        )  # fmt: skip

    def in_two(p: Problem):
        first, state = least_squares.chunk(cut(p, slice(0, split)), chunk_size=8)
        second, state = least_squares.recurrent(cut(p, slice(split, None), state))
        return torch.cat([first, second], 2), state

    same(everything(in_two, problem), everything(least_squares.definition, problem))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("run", [least_squares.definition, least_squares.recurrent, chunk(8)])
def test_padding_is_no_event(name, run):
    """Whatever lies behind a sequence's end, sequences run together as they run alone."""
    problem = make(SPECS[name], 21, extreme="constant" in name)
    lengths = [21, 6]
    padded = replace(problem, lengths=lengths)
    if problem.log_decay is not None:
        problem.log_decay[1, :, 6:] = -float("inf")
    o, state = run(padded)
    for i, length in enumerate(lengths):
        alone, last = run(padded.sequence(i))
        close(o[i : i + 1, :, :length], alone)
        for key, w in last.weights.items():
            close(state.weights[key][i : i + 1], w)
    grads = everything(run, padded)
    assert grads["d weight"][1, :, 6:].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_a_sequence_may_be_empty():
    problem = replace(make(SPECS["cg-vector-constant-after"], 5), lengths=[5, 0])
    for run in (least_squares.definition, least_squares.recurrent, chunk(4)):
        state = run(problem)[1]
        close(state.weights["H"][1], problem.state.weights["H"][1])


def test_the_state_has_constant_size():
    for name in SOME:
        sizes = {least_squares.recurrent(make(SPECS[name], T))[1].nbytes for T in (1, 7, 50)}
        assert sizes == {make(SPECS[name], 1, started=False).state.nbytes}


# Identities of the literature, on `chunk` and on the recursion


def gram(problem: Problem):
    """G, H over all pairs of a problem with a scalar gate or none: c_i = w_i prod_{j>i} a_j."""
    weight, k, v = problem.signals["weight"][..., 0, 0], problem.k[..., 0, :], problem.v[..., 0, :]
    log_decay = torch.zeros_like(weight) if problem.log_decay is None else problem.log_decay
    c = weight * (log_decay.sum(2, keepdim=True) - log_decay.cumsum(2)).exp()
    return (c * k).mT @ v, (c * k).mT @ k, log_decay.sum(2).exp()


def ridge(problem: Problem) -> torch.Tensor:
    return F.softplus(problem.params["ridge"]) + problem.spec.regressor.ridge_floor


def last_read(G, M, q):
    return (torch.linalg.solve(M, q[:, :, -1, :, None]).mT @ G)[..., 0, :]


@pytest.mark.parametrize("name", ["rls-none-constant-after", "cholesky-none-constant-after", "cg-none-constant-after"])
def test_r14_without_forgetting_all_solvers_are_ridge_regression(name):
    problem = make(SPECS[name], 33, started=False)
    G, gram_matrix, _ = gram(problem)
    M = gram_matrix + torch.diag_embed(ridge(problem))
    for run in (least_squares.recurrent, least_squares.chunk):
        o, state = run(problem)
        close(o[:, :, -1], last_read(G, M, problem.q))
        if "P" in state.weights:
            close(state.weights["W"], torch.linalg.solve(M, G))
            close(state.weights["P"], torch.linalg.inv(M))
        else:
            close(state.weights["G"], G)
            close(state.weights["H"], gram_matrix)


@pytest.mark.parametrize("name", ["rls-scalar-decaying-after", "cg-scalar-decaying-after", "cholesky-scalar-constant-after"])
def test_r15_a_ridge_decays_or_stays(name):
    problem = make(SPECS[name], 33, started=False)
    G, gram_matrix, kept = gram(problem)
    decayed, constant = (gram_matrix + torch.diag_embed(x * ridge(problem)) for x in (kept, 1.0))
    right, wrong = (decayed, constant) if "decaying" in name else (constant, decayed)
    for run in (least_squares.recurrent, least_squares.chunk):
        close(run(problem)[0][:, :, -1], last_read(G, right, problem.q))
    assert (last_read(G, right, problem.q) - last_read(G, wrong, problem.q)).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_r16_as_many_cg_steps_as_channels_solve(gate):
    spec = ttr.spec(SPECS[f"cg-{gate}-constant-after"], **{"optimizer.iterations": DK})
    exact = make(SPECS[f"cholesky-{gate}-constant-after"], 65)
    for run in (least_squares.definition, least_squares.chunk):
        close(run(replace(exact, spec=spec))[0], least_squares.definition(exact)[0], 1e-6)


def test_r17_one_cg_step_is_scaled_gated_linear_attention():
    spec = ttr.spec(SPECS["cg-scalar-constant-after"], **{"optimizer.iterations": 1})
    problem = make(spec, 20, started=False)
    G, gram_matrix, _ = gram(problem)
    q = problem.q[:, :, -1]
    gain = (q * q).sum(-1) / torch.einsum("nhk,nhkl,nhl->nh", q, gram_matrix + torch.diag_embed(ridge(problem)), q)
    close(least_squares.chunk(problem)[0][:, :, -1], gain[..., None] * (q[..., None, :] @ G)[..., 0, :])


def test_r18_a_large_ridge_is_gated_linear_attention():
    problem = make(SPECS["cg-vector-constant-after"], 20, started=False)
    problem = replace(problem, params={"ridge": torch.full((H, DK), 1e11, dtype=torch.float64)})
    keep, written = problem.log_decay.exp(), problem.signals["weight"][..., 0, 0] * problem.k[..., 0, :]
    G, outputs = torch.zeros(N, H, DK, DV, dtype=torch.float64), []
    for t in range(20):
        G = keep[:, :, t, :, None] * G + written[:, :, t, :, None] * problem.v[:, :, t]
        outputs.append((problem.q[:, :, t, None] @ G)[..., 0, :])
    close(1e11 * least_squares.chunk(problem)[0], torch.stack(outputs, 2))


def test_r19_rls_is_the_preconditioned_delta_rule():
    """W <- W - w P k (k^T W - v^T), P the inverse of H and its decaying ridge."""
    problem = make(SPECS["rls-scalar-decaying-after"], 20, started=False)
    M = torch.diag_embed(ridge(problem)).expand(N, -1, -1, -1)
    W = torch.zeros(N, H, DK, DV, dtype=torch.float64)
    for t in range(20):
        k, weight = problem.k[:, :, t], problem.signals["weight"][:, :, t, 0]
        M = problem.log_decay[:, :, t, :, None].exp() * M + weight * k.mT @ k
        W = W - weight * torch.linalg.solve(M, k.mT) @ (k @ W - problem.v[:, :, t])
    close(least_squares.recurrent(problem)[1].weights["W"], W)


def test_r20_richardson_on_the_read_is_gradient_descent_on_the_objective():
    """n steps x <- x + r (q - M x) read what n gradient steps from 0 on the ridge objective have learnt; both end here."""
    problem = make(SPECS["cg-scalar-constant-after"], 20, started=False)
    G, gram_matrix, _ = gram(problem)
    M, q = gram_matrix + torch.diag_embed(ridge(problem)), problem.q[:, :, -1, :, None]
    rate = 1 / torch.linalg.matrix_norm(M, 2).max()
    x, W = torch.zeros_like(q), torch.zeros_like(G)
    for _ in range(7):
        x, W = x + rate * (q - M @ x), W - rate * (M @ W - G)
    close(G.mT @ x, W.mT @ q)
    for _ in range(2000):
        W = W - rate * (M @ W - G)
    close(least_squares.chunk(problem)[0][:, :, -1, :, None], W.mT @ q)


def test_r21_orthonormal_keys_make_mesa_scaled_linear_attention():
    spec = {"regressor": {"kind": "least_squares", "weight": 1.0, "ridge_floor": 0.0}, "optimizer": "rls"}
    problem = make(spec, DK, started=False)
    one_hot = torch.eye(DK, dtype=torch.float64)[None, None, :, None].expand(N, H, DK, 1, DK)
    ones, raw = torch.ones(N, H, DK, 1, 1, 1, dtype=torch.float64), torch.full((H, DK), 0.4, dtype=torch.float64)
    state = least_squares.initial_state(problem.spec, {"ridge": raw}, N, H, DK, DV, torch.float64, "cpu")
    problem = replace(problem, k=one_hot, signals={"weight": ones}, params={"ridge": raw}, state=state)
    linear = (problem.q @ problem.k[..., 0, :].mT).tril() @ problem.v[..., 0, :]
    for run in (least_squares.definition, least_squares.recurrent, least_squares.chunk):
        close(run(problem)[0], linear / (1 + F.softplus(raw[0, 0])))


# The solver and its derivative


def matrices(draw: Draw, n: int) -> torch.Tensor:
    A = draw(n, 6, 6)
    return A @ A.mT / 6 + 0.5 * torch.eye(6, dtype=torch.float64)


def test_conjugate_gradients_count_their_steps():
    """The n-th iterate minimises the energy over the Krylov space of n vectors."""
    M, q = matrices(Draw(), 3), Draw(1)(3, 6)
    for n in (1, 2, 4):
        space = [q]
        for _ in range(n - 1):
            space.append((M @ space[-1][..., None])[..., 0])
        K = torch.stack(space, -1)
        best = K @ torch.linalg.solve(K.mT @ M @ K, K.mT @ q[..., None])
        close(conjugate_gradients(lambda p: (M @ p[..., None])[..., 0], q, n), best[..., 0])


def test_tolerance_stops_each_token_by_itself():
    M, q = matrices(Draw(), 4), Draw(1)(4, 6)
    M[0], q[1] = torch.eye(6, dtype=torch.float64), 0.0

    def product(p):
        return (M @ p[..., None])[..., 0]

    x = conjugate_gradients(product, q, 6, tolerance=0.2)
    assert (product(x) - q).norm(dim=-1).le(0.2 * q.norm(dim=-1)).all()
    close(x[0], q[0])
    assert x[1].abs().max() == 0
    stopped = [n for n in range(1, 7) if torch.equal(conjugate_gradients(product, q, n, 0.2), x)]
    assert 1 < stopped[0] < 6
    full = conjugate_gradients(product, q, 6)
    assert (full - x).abs().amax(-1)[2:].min() > 1e-6


def test_the_gradient_of_few_steps_is_the_implicit_one():
    """One token: q_bar = CG(M, x_bar), ridge_bar = -q_bar x, H_bar = -q_bar x^T, for the same two steps."""
    problem = make(SPECS["few-scalar-constant-before"], 1)
    w = problem.state.weights
    M = w["H"] + torch.diag_embed(ridge(problem))

    def solve(b):
        return conjugate_gradients(lambda p: (M @ p[..., None])[..., 0], b, 2)

    x = solve(problem.q[:, :, 0])
    o_bar = Draw(3)(N, H, 1, DV)
    q_bar = solve((w["G"] @ o_bar.mT)[..., 0])
    for run in (least_squares.definition, least_squares.recurrent, least_squares.chunk):
        inputs = {name: t.detach().clone().requires_grad_() for name, t in leaves(problem).items()}
        o, _ = run(with_leaves(problem, inputs))
        q, raw, matrix = torch.autograd.grad(o, [inputs["q"], inputs["ridge"], inputs["initial H"]], o_bar)
        close(q[:, :, 0], q_bar)
        close(raw, -(q_bar * x).sum(0) * problem.params["ridge"].sigmoid())
        outer = -q_bar[..., :, None] * x[..., None, :]
        close(matrix, (outer + outer.mT) / 2)


@pytest.mark.parametrize("name", ["cg-scalar-constant-after", "cg-vector-constant-after", "cholesky-scalar-constant-after"])
def test_the_backward_refuses_to_be_differentiated(name):
    problem = make(SPECS[name], 9)
    problem.params["ridge"].requires_grad_()
    o, _ = least_squares.chunk(problem, chunk_size=4)
    (grad,) = torch.autograd.grad(o.sum(), problem.params["ridge"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_the_exact_definition_may_be_differentiated_twice():
    problem = make(SPECS["cholesky-scalar-constant-after"], 4)

    def run(ridge):
        return least_squares.definition(replace(problem, params={"ridge": ridge}))[0]

    assert torch.autograd.gradgradcheck(run, problem.params["ridge"].requires_grad_())


@pytest.mark.parametrize("name", ["cg-scalar-constant-after", "cg-vector-constant-after", "cholesky-vector-constant-after"])
def test_torch_func_differentiates_chunk(name):
    problem = make(SPECS[name], 9)

    def loss(ridge):
        return least_squares.chunk(replace(problem, params={"ridge": ridge}), chunk_size=4)[0].square().sum()

    raw = problem.params["ridge"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(raw), raw)
    close(torch.func.grad(loss)(problem.params["ridge"]), expected)


class LargestTensor(TorchDispatchMode):
    """The most elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_cg_never_forms_a_matrix_per_token(gate):
    largest = []
    for T in (256, 512):
        problem = make(SPECS[f"cg-{gate}-constant-after"], T, dk=32, dv=32)
        problem = with_leaves(problem, {name: t.requires_grad_() for name, t in leaves(problem).items()})
        with LargestTensor() as seen:
            least_squares.chunk(problem)[0].sum().backward()
        assert seen.numel < N * H * T * 32 * 32 / 8
        largest.append(seen.numel)
    assert largest[1] <= 2 * largest[0]


def test_rls_meets_old_keys_again_after_long_forgetting():
    """Float32 and a gate that forgets each token almost at once: P is held, nothing runs away."""
    spec = {"regressor": {"kind": "least_squares", "ridge_decays": True}, "optimizer": "rls", "gate": "scalar"}
    problem = make(spec, 400, started=False)
    problem = with_leaves(problem, {name: t.float() for name, t in leaves(problem).items()})
    k = F.one_hot(torch.arange(400) // 100, DK).float()[None, None, :, None].expand(N, H, 400, 1, DK)
    problem = replace(problem, k=k, log_decay=torch.full_like(problem.log_decay, -1.0))
    o, state = least_squares.recurrent(problem)
    assert o.abs().max() < 1e2
    assert all(torch.isfinite(w).all() for w in state.weights.values())


def test_a_bad_chunk_size_is_named():
    with pytest.raises(ValueError, match="chunk_size=0"):
        least_squares.chunk(make(SPECS["cg-none-constant-after"], 3), chunk_size=0)
