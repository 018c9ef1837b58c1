"""Kernels of S <- decay S + (b k)(v - S k)^T, the bracket without S unless ERASE, o = scale S^T q, one decay and one b a head.

forward    decays.cumulate, [inverse], forward
backward   reverse, [pairs | weigh], readers, keys, [decays.carried, decays.decay_gradient]
between    where sequences are cut: forward and reverse once more, `local`, and segments

An event is one step on one pair, a chunk C events. A token is STEPS events: it decays before the first and is read once, so
that a chunk's queries, outputs and their gradients are C / STEPS rows (`reading`).

In brackets: inverse and pairs with ERASE, weigh without it where there are weights, the last two where the log decay wants
a gradient. plan.py says how each is launched, run.py in which order.
"""
