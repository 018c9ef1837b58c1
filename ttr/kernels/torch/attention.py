"""Causal softmax attention, full or over a sliding window: the kernel regressor's definition and its fast path.

    o_t = sum_i a_ti v_i,  a_t = softmax_i(q_t^T k_i)  over i <= t, or over t - window < i <= t and i < prefix  (q comes scaled)

The state is a cache of pairs, right-aligned: k [N, H, S, dk], v [N, H, S, dv], the last `length` [N] of the S are
sequence n's, the newest at the end, and zeros stand before them. S grows with every token and stops at prefix + window.
Sources: 1706.03762; sliding window: 2004.05150.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...regressors import Kernel
from ...spec import Spec
from ...state import State
from ..problem import Problem


def initial_state(
    spec: Spec, params: dict[str, Tensor], n: int, n_heads: int, dk: int, dv: int, dtype: torch.dtype, device: torch.device | str | None
) -> State:
    """An empty cache for n sequences."""
    cache = {name: torch.zeros(n, n_heads, 0, d, dtype=dtype, device=device) for name, d in (("k", dk), ("v", dv))}
    return State(weights={**cache, "length": torch.zeros(n, dtype=torch.int64, device=device)}, spec_hash=spec.hash)


def _kernel(problem: Problem) -> Kernel:
    return cast(Kernel, problem.spec.regressor)


def definition(problem: Problem) -> tuple[Tensor, State]:
    """One sequence and one query at a time: (o [N, H, T, dv], state)."""
    kernel = _kernel(problem)
    N, _, T, _ = problem.q.shape
    S = problem.state.weights["k"].shape[2]
    size = kernel.kept(S + T)
    outputs, keys, values, lengths = [], [], [], []
    for n in range(N):
        one = problem.sequence(n)
        cache = one.state.weights
        first = S - int(cache["length"])
        k = torch.cat([cache["k"][:, :, first:], one.k[..., 0, :]], 2)
        v = torch.cat([cache["v"][:, :, first:], one.v[..., 0, :]], 2)
        past = S - first
        rows = []
        for t in range(one.q.shape[2]):
            last = past + t + 1
            seen = _in_sight(kernel, last)
            scores = (k[:, :, seen] * one.q[:, :, t, None]).sum(-1)  # [1, H, pairs seen]
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = weights / weights.sum(-1, keepdim=True)
            rows.append((weights[..., None] * v[:, :, seen]).sum(2))
        o = torch.stack(rows, 2) if rows else one.v[..., 0, :]
        outputs.append(F.pad(o, (0, 0, 0, T - o.shape[2])))
        kept = _in_sight(kernel, k.shape[2])
        keys.append(F.pad(k[:, :, kept], (0, 0, size - len(kept), 0)))
        values.append(F.pad(v[:, :, kept], (0, 0, size - len(kept), 0)))
        lengths.append(len(kept))
    length = problem.state.weights["length"].new_tensor(lengths)
    weights = {"k": torch.cat(keys), "v": torch.cat(values), "length": length}
    return torch.cat(outputs), State(weights=weights, spec_hash=problem.state.spec_hash)


def _in_sight(kernel: Kernel, last: int) -> list[int]:
    """Of pairs 0 ... last - 1 those that the newest sees: the kept prefix, and the window that ends there."""
    first = 0 if kernel.window is None else max(0, last - kernel.window)
    return [*range(min(kernel.prefix, first)), *range(first, last)]


def sdpa(problem: Problem) -> tuple[Tensor, State]:
    """The same through torch's scaled_dot_product_attention; a mask is built only if there is a cache or a window."""
    cache = problem.state.weights
    S, T = cache["k"].shape[2], problem.q.shape[2]
    window = _kernel(problem).window
    k = torch.cat([cache["k"], problem.k[..., 0, :]], 2)
    v = torch.cat([cache["v"], problem.v[..., 0, :]], 2)
    if S == 0 and (window is None or window >= T):
        o = F.scaled_dot_product_attention(problem.q, k, v, is_causal=True, scale=1.0)
    else:
        mask = _visible(cache["length"], S, T, _kernel(problem))
        o = F.scaled_dot_product_attention(problem.q, k, v, attn_mask=mask, scale=1.0)
    return o, _cache(problem, k, v)


def _visible(length: Tensor, S: int, T: int, kernel: Kernel) -> Tensor:
    """[N, 1, T, S + T] bool: the keys each query sees.

    A sequence's pairs are contiguous, or the prefix and then contiguous: behind the prefix, places are distances.
    """
    at = torch.arange(S + T, device=length.device)
    back = at[S:, None] - at  # how far behind the query a key stands
    number = at - (S - length[:, None])  # [N, S + T], of the pair among its sequence's; negative where there is none
    if kernel.window is None:
        return ((back >= 0) & (number >= 0)[:, None])[:, None]
    near = (back < kernel.window) | (number < kernel.prefix)[:, None]
    return ((back >= 0) & near & (number >= 0)[:, None])[:, None]


def _cache(problem: Problem, k: Tensor, v: Tensor) -> State:
    """Old and new pairs [N, H, S + T, d], cut to prefix and window and right-aligned again."""
    length, kernel = problem.state.weights["length"], _kernel(problem)
    total, T = k.shape[2], problem.q.shape[2]
    size = kernel.kept(total)
    if problem.lengths is None and not kernel.prefix:
        length = length + T
        kept = {"k": k[:, :, total - size :], "v": v[:, :, total - size :]}
    else:
        new = torch.full_like(length, T) if problem.lengths is None else length.new_tensor(problem.lengths)
        first, length = total - T - length, length + new  # where a sequence's pairs begin, and how many there are
        held = length.clamp(max=size)
        number = torch.arange(size, device=k.device) - (size - held)[:, None]  # [N, size], among what is kept
        skipped = (length - held)[:, None]
        source = first[:, None] + torch.where(number < kernel.prefix, number, number + skipped)
        index, real = source.clamp(min=0)[:, None, :, None], (number >= 0)[:, None, :, None]
        kept = {
            name: torch.where(real, x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), 0) for name, x in (("k", k), ("v", v))
        }  # fmt: skip
    return State(weights={**kept, "length": length.clamp(max=size)}, spec_hash=problem.state.spec_hash)
