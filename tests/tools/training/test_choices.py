from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lit_lora.errors import UserError
from lit_lora.tools.training.base import find_base
from lit_lora.tools.training.choices import choose
from lit_lora.tools.training.images import Images


def _images(*sizes: tuple[int, int, int]) -> Images:
    """Images of these widths and heights, each so many times."""
    widths = np.concatenate([np.full(count, width) for width, _, count in sizes])
    heights = np.concatenate([np.full(count, height) for _, height, count in sizes])
    return Images(widths, heights, ("a cat",) * len(widths))


@pytest.mark.parametrize(
    ("count", "val_samples", "together", "steps", "rank"),
    [
        (1, 0, 1, 400, 16),
        (3, 0, 1, 690, 16),
        (4, 1, 1, 690, 16),
        (20, 2, 2, 850, 16),
        (200, 16, 4, 1360, 16),
        (5000, 16, 4, 7060, 32),
        (10**6, 16, 4, 10_000, 32),
    ],
)
def test_the_length_follows_from_the_number_of_images(
    count: int, val_samples: int, together: int, steps: int, rank: int
) -> None:
    found = choose(find_base("sdxl"), _images((1024, 1024, count)), {})
    assert (found.val_samples, found.batch_size * found.accumulate, found.steps) == (val_samples, together, steps)
    assert (found.rank, found.lr, found.lr_ratio, found.buckets) == (rank, 1e-4, 8, False)


@pytest.mark.parametrize(
    ("width", "height", "resolution"), [(2000, 3000, 1024), (800, 800, 768), (1024, 600, 768), (512, 512, 512)]
)
def test_the_resolution_is_not_above_what_the_images_have(width: int, height: int, resolution: int) -> None:
    assert choose(find_base("sdxl"), _images((width, height, 9)), {}).resolution == resolution


def test_a_batch_takes_its_images_from_one_bucket() -> None:
    base = find_base("sdxl")
    square = choose(base, _images((1024, 1024, 40)), {})
    assert (square.batch_size, square.accumulate, square.buckets) == (4, 1, False)
    mixed = choose(base, _images((1024, 1024, 37), (700, 1300, 3)), {})
    assert (mixed.batch_size, mixed.accumulate, mixed.buckets) == (2, 2, True)
    lonely = choose(base, _images((1024, 1024, 99), (700, 1300, 1)), {})
    assert (lonely.batch_size, lonely.accumulate) == (1, 4)


def test_what_is_given_is_taken_and_said() -> None:
    given: dict[str, Any] = {
        "steps": 7,
        "rank": 3,
        "batch_size": 2,
        "accumulate": 5,
        "resolution": 320,
        "val_samples": 0,
    }
    found = choose(find_base("sdxl"), _images((64, 64, 9)), given | {"lr": 0.5})
    assert (found.steps, found.rank, found.batch_size, found.accumulate) == (7, 3, 2, 5)
    assert (found.resolution, found.val_samples, found.lr) == (320, 0, 0.5)
    assert [choice.name for choice in found.why if choice.why == "as given"] == [
        "images",
        "size",
        "step",
        "steps",
        "rank",
        "rate",
    ]


def test_passes_are_those_that_show_repeated_sets_so_often() -> None:
    images = _images((1024, 1024, 80))
    [once], [repeated] = (
        [choice.why for choice in choose(find_base("sdxl"), one, {}).why if choice.name == "steps"]
        for one in (images, replace(images, repeats=4.0))
    )
    passes = float(once.split()[0])
    assert repeated == f"{passes / 4:.3g} passes with the repeats of the sets: 400 x the root of the images"


def test_images_that_are_too_small() -> None:
    with pytest.raises(UserError, match="median has the area of 511 x 511 px, less than 512 x 512; take larger images"):
        choose(find_base("sdxl"), _images((511, 511, 9)), {})


def test_passes_count_batches_that_are_not_full() -> None:
    """Each bucket's last batch is padded, so that 184 images in batches of 16 are 12 batches."""
    found = choose(find_base("embedded"), _images((32, 32, 200)), {"steps": 120})
    assert [one.why for one in found.why if one.name == "steps"] == ["as given"]
    [why] = [one.why for one in choose(find_base("embedded"), _images((32, 32, 200)), {}).why if one.name == "steps"]
    assert why == "28.3 passes: 400 x the root of the images"  # 340 steps / 12
