"""Objectives: one file each."""

from lit_lora.objectives.base import NoisySample, Objective
from lit_lora.objectives.ddpm import DDPM

__all__ = ["DDPM", "NoisySample", "Objective"]
