"""Mini-batches of frozen gradients on two linear layers (TTT-MLP, Titans): f(x) = [x +] [LN](a(x Z_0 + c_0) Y_0 + d_0).

The numbers R, Q0, F and phi are those of `mini_batch`. A memory is one row of numbers a slot: Z [dk, m], Y [m, dv], and the
biases c [m], d [dv]. With X = a(A), A = K Z_0 + c_0:

    U = dl/d(X Y_0 + d_0),   L = (U Y_0^T) * a'(A)                                  gradients of the upper and the lower layer
    B = a(sum_s Q0_s * (Q Z_s) + (R * Q K^T) L),    O = [Q +] [LN](sum_s Q0_s * (B Y_s) + (R * B X^T) U)
    Z_s <- sum_l phi_sl Z_l + K^T (F_s * L),        Y_s <- sum_l phi_sl Y_l + X^T (F_s * U)

A memory is too wide for one program's registers. In the scans every head has several (`parts`), each of which keeps 64 hidden
units' part of it in registers from mini-batch to mini-batch; what the layer gives out is summed over them at every mini-batch
(`exchange`), for which they must run at the same time: a cooperative launch of as many heads as the GPU has room for.

`run` takes so many of those heads' mini-batches at a time (a group, `groups`) that their reads fill the GPU; of every group the
memory it began with is kept, the rest is made again for the gradient, which goes back in halves of it. Where the GPU has no room for
all heads, whole sequences run after others if that takes no longer, each with the masks of its own pairs. advance (a scan), outputs;
backward: advance again, readers, writers, retreat (the scan back), written_gradient; all but the scans take the mini-batches of a
group at once.
"""
