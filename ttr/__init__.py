"""ttr: test-time regression. Declare a layer that learns while it reads; run it the fastest exact way."""

from .choice import select_path
from .explanation import explain
from .gates import Gate
from .inner_optim import Mirror, Optimizer, Solver, StepRule
from .kernels.api import regress
from .kernels.decode import decode
from .kernels.divergence import detect_divergence
from .kernels.triton.tune import tune
from .layers import LM, Block, ComposedState, Composition, LMState, Mixer, MixerState, declare, layer
from .layers.diagnose import diagnose
from .objectives import Objective
from .registry import SpecError, composition, gate, mirror, objective, optimizer, regressor, signal_map, stage, step_rule
from .regressors import Regressor, linear, normal, ones, zeros
from .signals import Signal, SignalMap, signal
from .sources import compositions
from .spec import Spec, presets, spec
from .stages import Stage
from .state import State

__all__ = [
    "LM", "Block", "ComposedState", "Composition", "Gate", "LMState", "Mirror", "Mixer", "MixerState", "Objective", "Optimizer",
    "Regressor", "Signal", "SignalMap", "Solver", "Spec", "SpecError", "Stage", "State", "StepRule", "composition",
    "compositions", "declare", "decode", "detect_divergence", "diagnose", "explain", "gate", "layer", "linear", "mirror", "normal",
    "objective", "ones", "optimizer", "presets", "regress", "regressor", "select_path", "signal", "signal_map", "spec",
    "stage", "step_rule", "tune", "zeros",
]  # fmt: skip
