"""Optimizers that carry one slot beside the weights (momentum, Nesterov, averaging): two states Z_s, mixed at every token.

The kernels know no optimizer, only the numbers that lowering probes of it and the gate, ten a token and head (`path`):

    z_t = A_t z_{t-1} + b_t (x) k_t U_t,     U_t = v_t - k_t (c_t^T z_{t-1})  or v_t,     o_t = q_t (r_t^T z_t  or z_{t-1})

What the tokens of a chunk do to each other are numbers as well (`levels`): P and R [C, C] for who looks at and who reads
whose write, X and Q [2, C] for what is left of the chunk's first state, F [2, C] and phi [2, 2] for what is left at its end:

    U = (I + P * K K^T)^-1 (V - sum_s X_s * (K Z_s)),     O = sum_s Q_s * (Q Z_s) + (R * Q K^T) U
    Z_s <- sum_l phi_sl Z_l + K^T (F_s * U)

forward    levels, prepare (all chunks at once), forward (a scan)
backward   levels, starts (a scan: Z before every chunk), reverse (the scan back: dV, and D behind every chunk),
           pairs, tokens, levels_gradient (all chunks at once)
"""
