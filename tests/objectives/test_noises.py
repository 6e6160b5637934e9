"""Kinds of noise against their formulas, written out anew."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import Upsample

from lit_lora.draws import Draws, seed_of
from lit_lora.errors import UserError
from lit_lora.objectives import OffsetNoise, PyramidNoise

DRAWS = Draws(7, [3, 11, 12])
NOISE = DRAWS.normal("noise", (4, 24, 16))


def test_offset_noise_moves_whole_channels() -> None:
    draws = Draws(0, range(64))
    difference = OffsetNoise(0.5).apply(torch.zeros(64, 4, 8, 8), draws)
    assert torch.equal(difference, difference[:, :, :1, :1].expand(-1, -1, 8, 8))
    assert torch.equal(difference[:, :, :1, :1], 0.5 * draws.normal("noise offset", (4, 1, 1)))


def test_pyramid_noise() -> None:
    noise = PyramidNoise(0.4, 6).apply(NOISE, DRAWS)
    for place, slot in enumerate((3, 11, 12)):
        ratios, draws = random.Random(seed_of(7, "pyramid ratio", slot)), Draws(7, [slot])
        total, sizes = NOISE[place : place + 1].clone(), []
        for i in range(6):
            r = ratios.random() * 2 + 2
            h, w = max(1, int(24 / r**i)), max(1, int(16 / r**i))
            sizes.append((h, w))
            total += Upsample(size=(24, 16), mode="bilinear")(draws.normal(f"pyramid {i}", (4, h, w))) * 0.4**i
            if h == 1 or w == 1:
                break
        assert sizes[0] == (24, 16)
        assert 1 in sizes[-1]
        torch.testing.assert_close(noise[place], (total / total.std())[0])


def test_pyramid_noise_does_not_depend_on_the_batch_and_has_more_of_low_resolutions() -> None:
    alone = PyramidNoise().apply(NOISE[1:2], Draws(7, [11]))
    torch.testing.assert_close(PyramidNoise().apply(NOISE, DRAWS)[1:2], alone)

    def low(noise: torch.Tensor) -> float:
        return float(torch.nn.functional.avg_pool2d(noise, 8).std())

    assert low(PyramidNoise(0.9).apply(NOISE, DRAWS)) > 2 * low(NOISE)


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match=r"scale=0.0 is too small; it must be above 0"):
        OffsetNoise(0.0)
    with pytest.raises(UserError, match=r"discount=1.5 is out of range; it must lie in \(0, 1\]"):
        PyramidNoise(discount=1.5)
    with pytest.raises(UserError, match="levels=0 is too small; it must be at least 1"):
        PyramidNoise(levels=0)
