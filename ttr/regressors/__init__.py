"""Regressors: the small models a layer trains while it reads."""

from .base import Init, Regressor, linear, normal, ones, zeros
from .kernel import Kernel
from .least_squares import LeastSquares
from .linear import Linear
from .mlp import MLP

__all__ = ["MLP", "Init", "Kernel", "LeastSquares", "Linear", "Regressor", "linear", "normal", "ones", "zeros"]
