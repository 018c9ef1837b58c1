"""Mini-batches of frozen gradients on one linear layer (TTT-Linear): f(x) = [x +] [LN](x Z_0 + c_0).

The gradients G of a mini-batch are taken at the slots Z_s it began with (s = 0: the weights), so all that its tokens do to
each other is a matrix of numbers, made of the optimizer and the gate (by kernels, `masks`, where one slot stands beside the weights,
else by torch, `kernels.torch.masks`): R [b, b] for what a token reads of the mini-batch, Q0 [r, b] and phi [r, r] for what is left of
the slots, F [r, b] for what is written:

    Y = sum_s Q0_s * (Q Z_s) + (R * Q K^T) G        O = [Q +] [LN](Y)
    Z_s <- sum_l phi_sl Z_l + K^T (F_s * G)

advance (a scan over mini-batches: Z, G), outputs (all mini-batches at once); backward: outputs_gradient (all at once), retreat
(the scan back), written_gradient (all at once). What the scans carry is all that has to wait for its turn: outputs_gradient
makes once more, for retreat, the norm of K Z_0 that advance took G through.
"""
