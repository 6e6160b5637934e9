"""Training objectives: one file for each, and the parts of which they consist."""

from lit_lora.objectives.base import NoisySample, Objective
from lit_lora.objectives.contrast import Contrast
from lit_lora.objectives.criteria import (
    Criterion,
    ExponentialPseudoHuber,
    PseudoHuber,
    SNRPseudoHuber,
    SquaredError,
)
from lit_lora.objectives.ddpm import DDPM
from lit_lora.objectives.densities import CosMap, LogitNormal, Mode, TimestepDensity, Uniform
from lit_lora.objectives.flow_matching import FlowMatching
from lit_lora.objectives.masked import masked
from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.noises import NoiseKind, OffsetNoise, PyramidNoise
from lit_lora.objectives.prior_preservation import PriorPreservation
from lit_lora.objectives.weightings import (
    P2,
    CosMapWeighting,
    DebiasedEstimation,
    MinSNR,
    SigmaSqrt,
    SNRWeighting,
    SoftMinSNR,
    Weighting,
)

__all__ = [
    "DDPM",
    "P2",
    "Contrast",
    "CosMap",
    "CosMapWeighting",
    "Criterion",
    "DebiasedEstimation",
    "ExponentialPseudoHuber",
    "FlowMatching",
    "LogitNormal",
    "MinSNR",
    "Mode",
    "NoiseKind",
    "NoiseLevel",
    "NoisySample",
    "Objective",
    "OffsetNoise",
    "PriorPreservation",
    "PseudoHuber",
    "PyramidNoise",
    "SNRPseudoHuber",
    "SNRWeighting",
    "SigmaSqrt",
    "SoftMinSNR",
    "SquaredError",
    "TimestepDensity",
    "Uniform",
    "Weighting",
    "masked",
]
