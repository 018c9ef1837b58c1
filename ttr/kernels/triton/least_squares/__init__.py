"""Least squares (Mesa, MesaNet): (H_t + Lambda) x_t = scale q_t, o_t = G_t^T x_t, by conjugate gradients or exactly.

G and H are gated sums without erase, so all but the solve is linear attention, of which `scalar_gate` has the kernels: o is
its read with x in the place of q. Conjugate gradients form no matrix per token: what H_t does to a vector follows from H before
the chunk and the chunk's pairs. The exact solvers carry H_t through the chunk and eliminate in registers (`exact`), with decays of
both kinds. Here a decay is of a head; `least_squares_by_channel` has one for every key channel.

forward    decays.cumulate, statistics (H before every chunk), solve or exact (x), scalar_gate's forward on (x, k, v)
backward   scalar_gate's backward on (x, k, v): dx = G_t do_t; statistics; solve again, (H_t + Lambda) dq = dx;
           scalar_gate's backward on (x, k, k) with -dq for do: what H gives to k, w, the gate and the first H

The gradient is the implicit one, as on the torch paths: it belongs to the equation, not to the iterates.
"""
