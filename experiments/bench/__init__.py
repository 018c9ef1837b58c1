"""Benchmarks: ours and others side by side in one process; results are committed with the command that made them."""
