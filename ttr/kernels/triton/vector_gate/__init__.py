"""Kernels of S <- 2^g S + w E^T [+ p v^T], o = scale S^T q, with a decay for every key channel of a head.

E = v - S^T x, what the delta rule writes (ERASE; without it E = v); or -S^T x where what is written of v has keys p of its own
(ADDED). x are the keys as they look; w, as they write, the same times a weight a head or a channel.

forward    prepare, forward
backward   (rows), states, reverse, pairs, gradients, [values]
between    where sequences are cut: forward and reverse once more, `local`, and segments (with ERASE the scalar gate's)

In brackets: with ADDED; in parentheses: with ERASE, without it forward has kept the rows too. Only the scans (forward, states,
reverse) wait for their turn; the others take all chunks at once, prepare and gradients in two kernels each, one of them for the
chunks whose gates are too strong (`decays`, `rounds`). plan.py says how each is launched, run.py in which order.
"""
