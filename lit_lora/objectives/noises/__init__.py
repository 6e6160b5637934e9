"""Kinds of noise: one file for each."""

from lit_lora.objectives.noises.base import NoiseKind
from lit_lora.objectives.noises.offset import OffsetNoise
from lit_lora.objectives.noises.pyramid import PyramidNoise

__all__ = ["NoiseKind", "OffsetNoise", "PyramidNoise"]
