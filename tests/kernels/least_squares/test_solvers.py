"""The solvers of least squares: their steps, tolerance, memory, and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttr.kernels.torch import least_squares
from ttr.kernels.torch.implicit_solve import conjugate_gradients

from .problems import DV, SPECS, Draw, H, N, close, leaves, make, ridge, with_leaves


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


@pytest.mark.parametrize("name", ["cg-scalar-constant-after", "cg-vector-constant-after", "cholesky-none-constant-after"])
def test_no_token_has_a_matrix_of_its_own(name):
    largest = []
    for T in (256, 512):
        problem = make(SPECS[name], T, dk=32, dv=32)
        problem = with_leaves(problem, {name: t.requires_grad_() for name, t in leaves(problem).items()})
        with LargestTensor() as seen:
            least_squares.chunk(problem)[0].sum().backward()
        assert seen.numel < N * H * T * 32 * 32 / 8
        largest.append(seen.numel)
    assert largest[1] <= 2 * largest[0]


@pytest.mark.parametrize("at", ["after", "before"])
def test_weights_below_zero(at):
    """Only a map that gives none lets a chunk take their roots; a pair may take another back as long as H + Lambda stays positive."""
    spec = {"regressor": {"kind": "least_squares", "weight": {"map": "identity"}}, "optimizer": "cholesky", "read": at}
    problem = make(spec, 20)
    problem.signals["weight"] -= 0.5
    assert problem.signals["weight"].min() < 0
    close(least_squares.chunk(problem, chunk_size=8)[0], least_squares.definition(problem)[0])
