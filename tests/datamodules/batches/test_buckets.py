from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.datamodules.batches import buckets
from lit_lora.datamodules.batches.buckets import LEFT_OUT, AspectRatioBuckets, Bucketing
from lit_lora.errors import UserError

divisors = st.sampled_from([8, 16, 32, 64])
shapes = st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=50)


@given(divisors, st.integers(1, 20), st.floats(1, 16))
def test_sizes_keep_to_area_divisor_and_aspect_ratio(divisor, multiple, max_aspect_ratio):
    resolution = divisor * multiple
    sizes = AspectRatioBuckets(divisor, max_aspect_ratio).sizes(resolution)

    assert [resolution, resolution] in sizes.tolist()
    assert (sizes % divisor == 0).all()
    assert (sizes.prod(axis=1) <= resolution**2).all()
    assert (sizes.max(axis=1) <= sizes.min(axis=1) * max_aspect_ratio).all()
    assert {tuple(size) for size in sizes} == {tuple(size[::-1]) for size in sizes}
    assert (np.diff(sizes[:, 1] / sizes[:, 0]) > -1e-12).all()
    assert len(np.unique(sizes, axis=0)) == len(sizes)
    # None could grow by a divisor on its short side without growing beyond the area.
    for height, width in sizes.tolist():
        assert max(height, width) * (min(height, width) + divisor) > resolution**2


def test_sizes_are_those_of_sdxl():
    widths = AspectRatioBuckets(64, 4.0).sizes(1024)[:, ::-1].tolist()
    published = [[512, w] for w in (2048, 1984, 1920, 1856)] + [[576, w] for w in (1792, 1728, 1664)]
    published += [[640, 1600], [640, 1536], [704, 1472], [704, 1408], [704, 1344], [768, 1344], [768, 1280]]
    published += [[832, 1216], [832, 1152], [896, 1152], [896, 1088], [960, 1088], [960, 1024], [1024, 1024]]
    # Podell et al. 2023, appendix I, whose list also has some that are smaller by a divisor than the area allows.
    assert [size for size in published if size not in widths] == [[704, 1344], [832, 1152], [896, 1088], [960, 1024]]


@given(divisors, shapes)
def test_each_image_gets_the_nearest_ratio(divisor, images):
    bucketing = Bucketing.of(512, AspectRatioBuckets(divisor, 3.0))
    width, height = np.array(images).T
    ratios = np.log(bucketing.sizes[:, 1] / bucketing.sizes[:, 0])
    for image, bucket in zip(images, bucketing.assign(width, height), strict=True):
        distances = np.abs(ratios - np.log(image[0] / image[1]))
        assert distances[bucket] == pytest.approx(distances.min(), abs=1e-9)


@given(shapes, st.floats(1, 4), st.booleans())
def test_nothing_is_enlarged_beyond_the_limit(images, limit, with_buckets):
    bucketing = Bucketing.of(512, AspectRatioBuckets() if with_buckets else None, limit)
    width, height = np.array(images).T
    for (w, h), bucket, any_size in zip(
        images,
        bucketing.assign(width, height),
        Bucketing(bucketing.sizes).assign(width, height),
        strict=True,
    ):
        size = bucketing.sizes[any_size]
        scale = max(size[0] / h, size[1] / w)
        assert bucket == (LEFT_OUT if scale > limit else any_size)


def test_unknown_sizes_count_as_square():
    bucketing = Bucketing.of(512, AspectRatioBuckets(), 1.5)
    buckets = bucketing.assign(np.array([0, 700]), np.array([0, 0]))
    assert bucketing.sizes[buckets].tolist() == [[512, 512]] * 2


def test_without_buckets_all_are_square():
    bucketing = Bucketing.of(300, None)
    assert bucketing.sizes.tolist() == [[300, 300]]
    assert not bucketing.needs_sizes
    assert bucketing.assign(np.array([10, 5000]), np.array([700, 3])).tolist() == [0, 0]


def test_the_smallest_aspect_ratio_leaves_squares():
    assert AspectRatioBuckets(8, max_aspect_ratio=1.0).sizes(64).tolist() == [[64, 64]]


def test_description_identifies_the_sizes():
    assert AspectRatioBuckets(32, max_upscaling=1.5).description() == {"divisor": 32, "max_aspect_ratio": 2.0}


def test_digest_tells_choices_apart():
    choices = [
        Bucketing.of(512, None),
        Bucketing.of(576, None),
        Bucketing.of(512, None, 1.5),
        Bucketing.of(512, AspectRatioBuckets()),
        Bucketing.of(512, AspectRatioBuckets(32)),
    ]
    assert len({choice.digest for choice in choices}) == len(choices)
    assert Bucketing.of(512, None).digest == choices[0].digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AspectRatioBuckets(divisor=0), "divisor=0 is too small"),
        (lambda: AspectRatioBuckets(divisor=1).sizes(10**9), "resolution=1000000000 is too large"),
        (lambda: AspectRatioBuckets(max_aspect_ratio=0.5), r"buckets.max_aspect_ratio=0.5 must be in \[1, 16\]"),
        (
            lambda: AspectRatioBuckets(max_upscaling=0.5),
            r"max_upscaling=0.5 is too small; it must be at least 1, or null",
        ),
        (lambda: AspectRatioBuckets().sizes(500), "resolution=500 is not a multiple of buckets.divisor=64; choose 512"),
        (lambda: AspectRatioBuckets().sizes(20), "choose 64 or another divisor"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("limit", [None, 1.5])
def test_many_images_get_the_buckets_of_few(limit, monkeypatch):
    bucketing = Bucketing.of(512, AspectRatioBuckets(8, 3.0), limit)
    # The corners between two buckets, all ratios of small numbers, and extremes.
    edges = np.exp(bucketing._middles)
    sides = np.array([0, 1, 2, 2**31 - 1, *range(500, 700)])
    width = np.concatenate([np.round(edges * 100_000), np.repeat(sides, len(sides))]).astype(np.int32)
    height = np.concatenate([np.full(len(edges), 100_000), np.tile(sides, len(sides))]).astype(np.int32)
    few = bucketing.assign(width, height)
    monkeypatch.setattr(buckets, "_BLOCK", 10_007)
    assert np.array_equal(bucketing.assign(width, height), few)
