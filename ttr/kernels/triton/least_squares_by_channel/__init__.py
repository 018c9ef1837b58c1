"""Least squares with a decay for every key channel: `least_squares` says what is solved and why so, and solves exactly.

With e the square roots of a token's decays, E those from one token to another multiplied, H before the chunk H_0:

    H_t = E_t H_0 E_t + sum_(s <= t) w_s (E_ts k_s)(E_ts k_s)^T      so for rows P, one a token
    Y = ((P E) H_0) E + sum_s w_s <p_t E_ts, k_s> (E_ts k_s) + P Lambda

As in `vector_gate` the pairs of a chunk meet in its middle, where the decays bear that (near): the matrix of a token is then that
of no gate, but for a factor a channel on both sides. Else (far) they meet in rounds, as few as the decays allow.

forward    prepare, statistics (H before every chunk), solve and solve_far (x), vector_gate's forward on (x, k, v)
backward   vector_gate's backward on (x, k, v); prepare, statistics, both solves for dq; what H gives (`gradients`): -sum_t <dq_t,
           H_t x_t> is a bilinear form of pairs x, k and pairs dq, k, so by chunks it is vector_gate's prepare and gradients twice,
           with e for the decay: of queries x whose outputs' gradients are -dq E, and of queries dq with -x E; values are the keys,
           decayed too; between the chunks is `reverse`
between    where sequences are cut: statistics and reverse once more, `local`, and join
"""
