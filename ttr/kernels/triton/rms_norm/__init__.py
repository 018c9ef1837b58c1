"""Rows brought to a mean square of one and weighed, and the gradients of that."""
