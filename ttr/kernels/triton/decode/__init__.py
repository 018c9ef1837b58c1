"""Decoding: one token, the float32 state updated in place."""
