"""How much noise the samples of a batch have, in terms that all objectives share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NoiseLevel(NamedTuple):
    """The noise levels of ``B`` samples, for weightings and criteria that depend on them."""

    time: Tensor
    """Timesteps as fractions of the base's ``num_train_timesteps``, 0 for data and 1 for noise, float32 ``(B,)``; in flow
    matching, sigma."""
    snr: Tensor
    """Signal-to-noise ratios: the squared factor of the latents over that of the noise, float32 ``(B,)``; 0 is pure noise."""
