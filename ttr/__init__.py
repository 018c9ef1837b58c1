"""ttr: test-time regression. Declare a layer that learns while it reads; run it the fastest exact way."""

from .kernels.api import regress
from .lowering import select_path
from .registry import SpecError
from .spec import Spec, presets, spec
from .state import State

__all__ = ["Spec", "SpecError", "State", "presets", "regress", "select_path", "spec"]
