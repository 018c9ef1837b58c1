"""Stages of a stream: convolution and shift, feature maps, norms, rotary positions, output gate."""

from .base import Stage, StageModule, StreamSize
from .call import Call
from .conv import Conv, Shift
from .features import DPFP, ELU1, GELU, Hedgehog, Polynomial, ReLU, SiLU, Taylor
from .norms import L2, RMS, LayerNorm, Sum
from .output import Bonus, OutputGate, Skip
from .projection import Affine, Blend, LayerScale, Proj
from .rope import Rope
from .timeline import Packed, Timeline, pack, unpack

__all__ = [
    "DPFP", "ELU1", "GELU", "L2", "RMS", "Affine", "Blend", "Bonus", "Call", "Conv", "Hedgehog", "LayerNorm",
    "LayerScale", "OutputGate", "Packed", "Polynomial", "Proj", "ReLU", "Rope", "Shift", "SiLU", "Skip", "Stage",
    "StageModule", "StreamSize", "Sum", "Taylor", "Timeline", "pack", "unpack",
]  # fmt: skip
