"""Compositions: layers made of a memory and attention, by declaration. One file each; `declare` reads, `layer` builds."""

from .base import ComposedLayer, Composition
from .declare import Layered, declare, layer
from .mac import MAC
from .parallel import Parallel
from .series import Series

__all__ = ["MAC", "ComposedLayer", "Composition", "Layered", "Parallel", "Series", "declare", "layer"]
