"""Inner optimizers: one file each. `base.py` says what one is; CONTRIBUTING.md walks through adding one."""

from .adam import Adam
from .averaged import Averaged
from .base import Optimizer, Signals, Solver
from .delta import Delta
from .mirrors import Mirror, NoMirror, Norm, Softmax
from .momentum import Momentum
from .muon import Muon
from .sgd import SGD
from .solvers import CG, RLS, Cholesky
from .step_rules import NLMS, Implicit, Plain, StepRule

__all__ = [
    "CG", "NLMS", "RLS", "SGD", "Adam", "Averaged", "Cholesky", "Delta", "Implicit",
    "Mirror", "Momentum", "Muon", "NoMirror", "Norm", "Optimizer", "Plain", "Signals", "Softmax", "Solver", "StepRule",
]  # fmt: skip
