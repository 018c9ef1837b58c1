"""The short causal convolution, one filter a channel: one kernel forward and one backward, tokens as they lie."""
