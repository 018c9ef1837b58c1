"""`ttr.explain`: symbols, probed coefficients, lines of mathematics, neighbours, costs, sources, and the page of them."""

from .explain import Explanation, explain

__all__ = ["Explanation", "explain"]
