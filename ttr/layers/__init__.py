"""Layers: a declaration as an nn.Module (Mixer), a residual block of it (Block), a small language model (LM)."""

from .block import Block
from .lm import LM
from .mixer import Mixer
from .state import LMState, MixerState

__all__ = ["LM", "Block", "LMState", "Mixer", "MixerState"]
