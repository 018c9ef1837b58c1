"""Any linear recurrence one event at a time, as `kernels.torch.recurrent`, in one kernel: what no kernel over chunks serves.

The kernels know no mechanism, only the coefficients that lowering makes of one: r slots z (padded to a power of two), decays,
steps and reads of a head, a key channel, a value channel or both, micro-steps, keys to write with (`ttr.lowering`). A program
holds the slots of one head, of a tile of value channels, in registers. Everything is float32, and nothing is a matmul.

forward    a scan over the tokens
backward   the scan again for the slots before every sqrt(T)-th token, then piece by piece from the last one: the slots
           before each of its events, and the way back
"""
