"""Solve M_t x_t = q_t for many t; the backward solves again instead of unrolling the solver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..eager import known

Product = Callable[..., Tensor]  # (p, *theta) -> M(theta) p, M symmetric, differentiable in theta
Solver = Callable[..., Tensor]  # (q, *theta) -> x with M(theta) x = q


def implicit_solve(q: Tensor, product: Product, solver: Solver, theta: tuple[Tensor, ...]) -> Tensor:
    """x with M(theta) x = q, M given by its product with vectors.

    Gradients are the implicit ones: q_bar = M^{-1} x_bar by the same solver, and theta_bar the vector-Jacobian product
    of theta -> -q_bar^T M(theta) x. For a solver that stops early they belong to the equation, not to its iterates.
    They can be taken once: a second differentiation raises RuntimeError.
    """
    return _ImplicitSolve.apply(product, solver, q, *theta)  # type: ignore[no-any-return]


class _ImplicitSolve(torch.autograd.Function):
    @staticmethod
    def forward(product: Product, solver: Solver, q: Tensor, *theta: Tensor) -> Tensor:
        return solver(q, *theta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.product, ctx.solver, _, *theta = inputs
        ctx.save_for_backward(output, *theta)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (x_bar,) = grads
        saved = ctx.saved_tensors
        x, *theta = (s.detach() for s in saved)
        q_bar = ctx.solver(x_bar.detach(), *theta)
        pull_back = torch.func.vjp(lambda *parts: ctx.product(x, *parts), *theta)[1]
        out = (q_bar, *pull_back(-q_bar))
        if torch.is_grad_enabled():  # create_graph: say so when someone differentiates what has no second derivative
            out = _Once.apply(len(out), *out, x_bar, *saved)
        return None, None, *out


class _Once(torch.autograd.Function):
    """Passes the first n tensors on; depends on all of them; cannot be differentiated."""

    @staticmethod
    def forward(n: int, *tensors: Tensor):
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise RuntimeError(
            "least_squares was differentiated twice: its backward solves the normal equations again and has no derivative "
            "of its own. With optimizer cholesky, path='definition' can be differentiated any number of times."
        )


def conjugate_gradients(product: Callable[[Tensor], Tensor], q: Tensor, iterations: int, tolerance: float = 0.0) -> Tensor:
    """`iterations` steps of conjugate gradients on M x = q from x = 0, every row of q [..., dk] a system of its own.

    A row whose residual is below tolerance |q|, or below what its dtype resolves, stops moving. Source: Hestenes and
    Stiefel (1952); MesaNet (2506.05233).
    """
    x, r, p = torch.zeros_like(q), q, q
    rr = (q * q).sum(-1, keepdim=True)
    limit = max(tolerance, torch.finfo(q.dtype).eps) ** 2 * rr
    for _ in range(iterations):
        moving = rr > limit
        if known(q) and not bool(moving.any()):
            break  # every further step would be void
        y = product(p)
        step = torch.where(moving, rr / torch.where(moving, (p * y).sum(-1, keepdim=True), 1), 0)
        x, r = x + step * p, r - step * y
        rr_next = torch.where(moving, (r * r).sum(-1, keepdim=True), rr)
        p = r + torch.where(moving, rr_next / torch.where(moving, rr, 1), 0) * p
        rr = rr_next
    return x
