"""Regressors: the small models a layer trains while it reads."""

from .kernel import Kernel
from .least_squares import LeastSquares
from .linear import Linear
from .mlp import MLP

# last, for the function `linear` bears the name of a module here
from .base import Init, Regressor, linear, normal, ones, zeros  # isort: skip

__all__ = ["MLP", "Init", "Kernel", "LeastSquares", "Linear", "Regressor", "linear", "normal", "ones", "zeros"]
