"""What `compile_only` compiles: the launches of forward and backward, a module for each folder of ttr/kernels/triton.

In each, `launches(everything)` yields (what, launch, watched): what names the call; watched: whether a change of what spills is to be
noticed. Without everything it is what continuous integration has the time for.
"""

from . import (
    decode,
    least_squares,
    least_squares_by_channel,
    mini_batch,
    recurrent,
    rms_norm,
    scalar_gate,
    short_conv,
    two_layers,
    two_slots,
    unit_norm,
    vector_gate,
)

FAMILIES = (
    decode, unit_norm, rms_norm, short_conv, mini_batch, two_layers, two_slots, recurrent, least_squares, least_squares_by_channel,
    vector_gate, scalar_gate,
)  # fmt: skip
