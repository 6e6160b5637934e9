"""Weightings of the loss by noise level: one file for each."""

from lit_lora.objectives.weightings.base import Weighting
from lit_lora.objectives.weightings.cosmap import CosMapWeighting
from lit_lora.objectives.weightings.debiased import DebiasedEstimation
from lit_lora.objectives.weightings.min_snr import MinSNR
from lit_lora.objectives.weightings.p2 import P2
from lit_lora.objectives.weightings.sigma_sqrt import SigmaSqrt
from lit_lora.objectives.weightings.snr_weighting import SNRWeighting
from lit_lora.objectives.weightings.soft_min_snr import SoftMinSNR

__all__ = [
    "P2",
    "CosMapWeighting",
    "DebiasedEstimation",
    "MinSNR",
    "SNRWeighting",
    "SigmaSqrt",
    "SoftMinSNR",
    "Weighting",
]
