"""The short causal convolution, one filter a channel, tokens as they lie: one kernel forward, with or without SiLU behind it, which
backward runs once more for what SiLU is taken of, and one for the gradients."""
