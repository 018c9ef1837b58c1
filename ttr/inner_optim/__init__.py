"""Inner optimizers: one file each. `base.py` says what one is; CONTRIBUTING.md walks through adding one."""

from .adam import Adam
from .averaged import Averaged
from .base import Optimizer, Signals, Solver
from .delta import Delta
from .momentum import Momentum
from .muon import Muon
from .sgd import SGD
from .solvers import CG, RLS, Cholesky
from .step_rules import NLMS, Implicit, Plain, StepRule

__all__ = [
    "CG", "NLMS", "RLS", "SGD", "Adam", "Averaged", "Cholesky", "Delta", "Implicit",
    "Momentum", "Muon", "Optimizer", "Plain", "Signals", "Solver", "StepRule",
]  # fmt: skip
