"""The canonical recurrence chunk by chunk: matmuls inside a chunk, one step of the state between chunks.

Inside a chunk of C events, P_ij is what event j's error adds to the look of event i > j, R_tj what it adds to the
read of token t, X0 / Q0 the look and read rows pulled back to the chunk's start, F the columns pushed to its end:

    (I - P) [E_X, E_V] = [X0, -V],   E = E_V + E_X z,   z <- Phi z + F^T E,   o = Q0 z + R E

Pair products are taken by midpoint factoring: for i right and j left of the midpoint of their smallest common
block, P_ij = <row_i pulled back to the midpoint, column_j pushed to it>. Blocks double log2 C times. Nothing is
divided, nothing positive is exponentiated, so every gate is exact, and no [C, C, dk] tensor exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...lowering import LinearRecurrence, lower
from ...state import State
from ..problem import Problem
from .recurrent import stack_slots, unstack_slots


def chunk(problem: Problem, chunk_size: int = 32) -> tuple[Tensor, State]:
    """All tokens at once; chunk_size: tokens a tile holds, a power of two. It changes speed and memory, not the result.

    32 is as fast as 64 on a CPU and rounds better: the triangular system of an ungated delta rule worsens with C.
    """
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size!r}: expected a power of two (1, 2, 4, ..., 64, ...)")
    T = problem.q.shape[2]
    size = min(chunk_size, 1 << (T - 1).bit_length())
    padded = problem.padded(-(-T // size) * size)
    rec = lower(padded)
    if any(x.shape[-1] > 1 for x in (rec.A, rec.b, rec.c, rec.read)):
        raise ValueError(
            "path='chunk': a coefficient varies per value channel, so each column has its own triangular system; use path='recurrent'"
        )
    z = stack_slots(problem.state, problem.spec.optimizer.slots)
    o, z = run_chunks(rec, padded.q, z, size)
    return o[:, :, :T], unstack_slots(z, problem)


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of m tokens (m n events). D is dk when coefficients vary per key channel, else 1.

    look: [r, M, B, m n, D] rows on the state before the block, or None if nothing is solved. read: [r, M, B, m, D].
    column: [G, r, M, B, m n, D], pushed to the block's end; group 0 is multiplied by errors, group 1 is known.
    phi: [r, r, M, B, D] the block's transition. P: [G, M, B, m n, m n] or None; R: [G, M, B, m, m n].
    """

    look: Tensor | None
    read: Tensor
    column: Tensor
    phi: Tensor
    P: Tensor | None
    R: Tensor


def _pull(row: Tensor, phi: Tensor) -> Tensor:
    """Rows on the state after a block -> rows before it: row'[k] = sum_l row[l] phi[l, k]."""
    return torch.stack([sum_of(row[i] * phi[i, k][..., None, :] for i in range(len(row))) for k in range(len(row))])


def _push(phi: Tensor, column: Tensor) -> Tensor:
    """Columns at a block's start -> at its end: column'[k] = sum_l phi[k, l] column[l], for every group."""
    r = phi.shape[0]
    return torch.stack([sum_of(column[:, j] * phi[k, j][..., None, :] for j in range(r)) for k in range(r)], 1)


def _pairs(row: Tensor, column: Tensor) -> Tensor:
    """sum over slots and channels of row_i column_j: [G, ..., rows, columns]."""
    return sum_of(row[k] @ column[:, k].mT for k in range(len(row)))


def sum_of(terms) -> Tensor:
    terms = list(terms)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def tokens_as_blocks(A: Tensor, c: Tensor | None, b: Tensor, q: Tensor, read_before: bool) -> Blocks:
    """One block a token. A: [r, r, M, C, n, D]; c: [r, M, C, n, D]; b: [G, r, M, C, n, D]; q: [r, M, C, D]."""
    n = A.shape[4]
    read = q[..., None, :]
    look_rows, P_rows = [], []
    phi = A[:, :, :, :, 0]
    columns = b[..., 0:1, :]
    if c is not None:
        look_rows.append(c[..., 0:1, :])
        P_rows.append(b.new_zeros(b.shape[0], *b.shape[2:4], 1, n))
    for j in range(1, n):  # micro-steps are few; inside a token they are taken one after another
        step = A[:, :, :, :, j]
        if c is not None:
            row = c[..., j : j + 1, :]
            look_rows.append(_pull(row, phi))
            P_rows.append(torch.nn.functional.pad(_pairs(row, columns), (0, n - j)))
        columns = torch.cat([_push(step, columns), b[..., j : j + 1, :]], -2)
        phi = _compose(step, phi)
    if read_before:
        R = b.new_zeros(b.shape[0], *b.shape[2:4], 1, n)
        pulled = read
    else:
        R = _pairs(read, columns)
        pulled = _pull(read, phi)
    look = None if c is None else torch.cat(look_rows, -2)
    return Blocks(look, pulled, columns, phi, None if c is None else torch.cat(P_rows, -2), R)


def _compose(later: Tensor, earlier: Tensor) -> Tensor:
    r = later.shape[0]
    return torch.stack([torch.stack([sum_of(later[i, k] * earlier[k, j] for k in range(r)) for j in range(r)]) for i in range(r)])


def double(blocks: Blocks) -> Blocks:
    """Join neighbours: what the left block wrote meets what the right block reads at the midpoint between them."""
    block_axis = 2

    def halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        pair = x.unflatten(axis, (-1, 2))
        return pair.select(axis + 1, 0), pair.select(axis + 1, 1)

    read_l, read_r = halves(blocks.read, block_axis)
    column_l, column_r = halves(blocks.column, block_axis + 1)
    phi_l, phi_r = halves(blocks.phi, block_axis + 1)
    R_l, R_r = halves(blocks.R, block_axis)
    R = torch.cat([torch.nn.functional.pad(R_l, (0, R_r.shape[-1])), torch.cat([_pairs(read_r, column_l), R_r], -1)], -2)
    look = P = None
    if blocks.look is not None and blocks.P is not None:
        look_l, look_r = halves(blocks.look, block_axis)
        P_l, P_r = halves(blocks.P, block_axis)
        P = torch.cat([torch.nn.functional.pad(P_l, (0, P_r.shape[-1])), torch.cat([_pairs(look_r, column_l), P_r], -1)], -2)
        look = torch.cat([look_l, _pull(look_r, phi_l)], -2)
    return Blocks(
        look=look,
        read=torch.cat([read_l, _pull(read_r, phi_l)], -2),
        column=torch.cat([_push(phi_r, column_l), column_r], -2),
        phi=_compose(phi_r, phi_l),
        P=P,
        R=R,
    )


def run_chunks(rec: LinearRecurrence, q: Tensor, z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """rec over T tokens, T a multiple of `size`; z: [r, N, H, dk, dv]. Returns o: [N, H, T, dv] and the last z."""
    N, H, T, dk = q.shape
    r, M = rec.r, N * H * (T // size)
    per_key = max(x.shape[-2] for x in (rec.A, rec.b, rec.c, rec.read)) > 1

    def tiles(x: Tensor, lead: int) -> Tensor:  # [..., N, H, T, *] -> [..., M, size, *]
        return x.reshape(*x.shape[:lead], M, size, *x.shape[lead + 3 :])

    k, q_ = tiles(rec.k, 0), tiles(q, 0)  # [M, C, n, dk], [M, C, dk]
    A, c, b, read = tiles(rec.A[..., 0], 2), tiles(rec.c[..., 0], 1), tiles(rec.b[..., 0], 1), tiles(rec.read[..., 0], 1)
    writes, b_groups = [k], [b]
    if rec.known is not None:
        writes.append(tiles(rec.known[1], 0))
        b_groups.append(tiles(rec.known[0][..., 0], 1))
    if per_key:  # the keys enter the pair products themselves
        b_groups = [b * w for b, w in zip(b_groups, writes, strict=True)]
        c, read = c * k, read * q_
        A = A.expand(*A.shape[:-1], dk)
    blocks = tokens_as_blocks(A, c if rec.solve else None, torch.stack(torch.broadcast_tensors(*b_groups)), read, rec.read_before)
    while blocks.read.shape[2] > 1:
        blocks = double(blocks)

    # [M, ...] with the single block's axis dropped; slots and channels as one axis
    X, Q = k.flatten(1, 2), q_
    W = torch.stack([w.flatten(1, 2) for w in writes])
    look = None if blocks.look is None else blocks.look[:, :, 0]
    rows, columns = blocks.read[:, :, 0], blocks.column[:, :, :, 0]
    P, R, phi = None if blocks.P is None else blocks.P[:, :, 0], blocks.R[:, :, 0], blocks.phi[:, :, :, 0]
    if not per_key:  # coefficients are numbers: multiply them into plain Gram matrices
        R = R * (Q @ W.mT)
        P = None if P is None else P * (X @ W.mT)
        look = None if look is None else look * X
        rows, columns = rows * Q, columns * W[:, None]
    F = _slots_last(columns)  # [G, M, C n, r dk]
    Q0 = _slots_last(rows)
    V = None if rec.v is None else tiles(rec.v, 0).flatten(1, 2)
    known = None if rec.known is None else tiles(rec.known[2], 0).flatten(1, 2)
    dv = z.shape[-1]
    target = q.new_zeros(M, X.shape[1], dv) if V is None else -V
    if look is not None and P is not None:
        if known is not None:
            target = target + P[1] @ known
        system = torch.cat([_slots_last(look), target], -1)
        solved = torch.linalg.solve_triangular(
            torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - P[0], system, upper=False, unitriangular=True
        )
        E_X, E_V = solved[..., : r * dk], solved[..., r * dk :]
        carry = F[0].mT @ E_X
    else:
        E_X, E_V, carry = None, target, None
    add = F[0].mT @ E_V
    if known is not None:
        add = add + F[1].mT @ known

    z_flat = _slots_last(z.flatten(1, 2), axis=-2)  # [N H, r dk, dv]
    Z, z_last = _between_chunks(phi, carry, add, z_flat, N * H)
    E = E_V if E_X is None else E_V + E_X @ Z
    o = Q0 @ Z + R[0] @ E
    if known is not None:
        o = o + R[1] @ known
    z = z_last.view(N, H, r, dk, dv).movedim(2, 0)
    return o.view(N, H, T, dv), z


def _slots_last(x: Tensor, axis: int = -1) -> Tensor:
    """[..r.., M, rows, dk] -> [.., M, rows, r dk] (axis -1), or z [r, M, dk, dv] -> [M, r dk, dv] (axis -2)."""
    if axis == -2:
        return x.movedim(0, 1).flatten(1, 2)
    lead = x.ndim - 4  # 0: [r, M, C, dk]; 1: [G, r, M, C, dk]
    return x.movedim(lead, -2).flatten(-2)


def _between_chunks(phi: Tensor, carry: Tensor | None, add: Tensor, z: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """z <- phi z + carry z + add over the chunks of every head: the states before each chunk and the last one."""
    r, D = phi.shape[0], phi.shape[-1]
    rows, dv = z.shape[-2:]
    dk = rows // r
    if carry is None:  # only slots mix: no matmul over channels
        steps = phi.view(r, r, heads, -1, D).unbind(3)
    else:
        diagonal = torch.diag_embed(phi.expand(r, r, -1, dk))  # [r, r, M, dk, dk]
        full = carry + diagonal.permute(2, 0, 3, 1, 4).reshape(-1, rows, rows)
        steps = full.view(heads, -1, rows, rows).unbind(1)
    states = []
    for step, new in zip(steps, add.view(heads, -1, rows, dv).unbind(1), strict=True):
        states.append(z)
        if carry is None:
            slots = z.view(heads, r, dk, dv)
            z = new + torch.einsum("ijhd,hjdv->hidv", step.expand(r, r, heads, dk), slots).reshape(heads, rows, dv)
        else:
            z = torch.baddbmm(new, step, z)
    return torch.stack(states, 1).flatten(0, 1), z
