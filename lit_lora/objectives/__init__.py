"""Training objectives: one file for each, and the densities of flow matching."""

from lit_lora.objectives.base import NoisySample, Objective
from lit_lora.objectives.ddpm import DDPM
from lit_lora.objectives.densities import CosMap, LogitNormal, Mode, TimestepDensity, Uniform
from lit_lora.objectives.flow_matching import FlowMatching

__all__ = [
    "CosMap",
    "DDPM",
    "FlowMatching",
    "LogitNormal",
    "Mode",
    "NoisySample",
    "Objective",
    "TimestepDensity",
    "Uniform",
]
