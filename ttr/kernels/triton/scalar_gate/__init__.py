"""Kernels of S <- decay S + (b k)(v - S k)^T, the bracket without S unless ERASE, o = scale S^T q, one decay and one b a head.

forward    decays.cumulate, [inverse], forward
backward   reverse, [pairs | weigh], readers, keys, [decays.carried, decays.decay_gradient]
between    where sequences are cut: forward and reverse once more, `local`, and segments

In brackets: inverse and pairs with ERASE, weigh without it where there are weights, the last two where the log decay wants
a gradient. plan.py says how each is launched, run.py in which order.
"""
