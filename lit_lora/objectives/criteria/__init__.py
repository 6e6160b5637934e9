"""Criteria, which measure the error of a prediction: one file for each."""

from lit_lora.objectives.criteria.base import Criterion
from lit_lora.objectives.criteria.exponential_pseudo_huber import ExponentialPseudoHuber
from lit_lora.objectives.criteria.pseudo_huber import PseudoHuber
from lit_lora.objectives.criteria.snr_pseudo_huber import SNRPseudoHuber
from lit_lora.objectives.criteria.squared_error import SquaredError

__all__ = ["Criterion", "ExponentialPseudoHuber", "PseudoHuber", "SNRPseudoHuber", "SquaredError"]
