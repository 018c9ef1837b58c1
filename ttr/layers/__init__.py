"""Layers: a declaration as an nn.Module (Mixer, or a composition of them), a residual block (Block), a language model (LM)."""

from .block import Block
from .compose import ComposedLayer, Composition, declare, layer
from .lm import LM
from .mixer import Mixer
from .state import ComposedState, LMState, MixerState

__all__ = ["LM", "Block", "ComposedLayer", "ComposedState", "Composition", "LMState", "Mixer", "MixerState", "declare", "layer"]
