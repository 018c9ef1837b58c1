"""What the matrices H_t give to k, w, the gate and the first H, of -sum_t <dq_t, H_t x_t>.

With S1_ts = <x_t E_ts, k_s> and S2_ts = <dq_t E_ts, k_s> a chunk's own pairs add -sum w_s S1_ts S2_ts to it: for keys k, written with
weights w and decays e, S1 is what queries x read and -S2 its gradient, and the other way about. So `vector_gate`'s kernels
have it, once for each; what of H_0 and of D behind the chunk is added stands in both, for D's half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....least_squares import symmetric
from ..vector_gate import run as vector_gate
from ..vector_gate.config import Config
from ..vector_gate.plan import kind_of, plan_of, rule_of
from .plan import Plan, segments_of


def gradients_of_matrices(
    p: Plan, config: Config, x, dq, keys, log_decay, weight, plain, left, dlast_H, first_H, cu_seqlens, learned: bool
):  # fmt: skip
    """dk [B, T, Hv, dk], dlog_decay or None, dweight or None, the first H's or None. plain, left: H and e of every chunk. log_decay:
    float32."""
    roots = log_decay * 0.5
    rule = rule_of(False, False, False, p.kind.before)
    unweighted = plan_of(kind_of(x, keys, roots, None, None, cu_seqlens, rule, config, 1, 0), False, False, False)
    buffers = [unweighted.made.make(x) for _ in range(2)]
    of_x, of_dq = (unweighted.made.arrays(buffer) for buffer in buffers)
    for rows, made in ((x, of_x), (dq, of_dq)):  # queries -rows E and reads -<rows E, k>
        vector_gate.prepare_chunks(unweighted, rows, keys, None, roots, None, None, made, cu_seqlens, -1.0)
    behind, dfirst = _reverse(p, x, of_x["queries"], of_dq["queries"], left, dlast_H, first_H, cu_seqlens)

    weighted = plan_of(kind_of(x, keys, roots, weight, None, cu_seqlens, rule, config, 1, 0), True, False, learned)
    found = []
    for rows, other in ((x, of_dq), (dq, of_x)):
        queries, reads, writes = other["queries"], other["reads"], other["writes"]
        given = rows, keys, None, roots, weight, plain, behind, writes, keys, queries, queries, reads, None, None, None, left, of_x["far"]
        found.append(vector_gate.of_chunks(weighted, given, cu_seqlens, 1.0))
    (_, dk, _, dlog_decay, dweight), (_, more_dk, _, more_dlog_decay, more_dweight) = found
    dk += more_dk
    # w is in both once, of which S1 S2 has one; a decay is the square of e
    if dlog_decay is not None:
        dlog_decay = (dlog_decay + more_dlog_decay) * 0.5
    if dweight is not None:
        dweight = (dweight + more_dweight) * 0.5
    return dk, dlog_decay, dweight, dfirst


def _reverse(p: Plan, x, seen, solved, left, dlast_H, first_H, cu_seqlens) -> tuple[Tensor, Tensor | None]:
    """D behind every chunk, and of the first H."""
    s = p.kind.sizes
    behind = x.new_empty((p.chunks, s.HV, s.dk, s.dk))
    dfirst = None if first_H is None else torch.empty_like(first_H)
    ended, end = dlast_H is not None, None if dlast_H is None else symmetric(dlast_H)
    rest = cu_seqlens, p.chunks * s.HV, s.T, p.segments, p.segment_chunks
    if p.segments > 1:
        local, between, transfer = segments_of(p, x)
        p.reverse(True, False)(seen, solved, left, None, None, local, transfer, *rest)
        p.join(ended, True)(end, local, transfer, between, p.segments)
        end = between
    p.reverse(False, ended)(seen, solved, left, end, behind, dfirst, None, *rest)
    return behind, dfirst
