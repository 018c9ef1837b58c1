"""`ttr.explain`: symbols, probed coefficients, lines of mathematics, neighbours, costs, sources, and the page of them."""

from .explain import ComposedExplanation, explain
from .memory import Explanation

__all__ = ["ComposedExplanation", "Explanation", "explain"]
