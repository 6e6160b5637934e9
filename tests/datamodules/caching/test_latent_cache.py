from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lit_lora.datamodules.caching.latent_cache import CacheDescription
from lit_lora.datamodules.decoding.captions import Captions, CaptionSource
from lit_lora.errors import UserError

CAPTIONS = Captions([CaptionSource("txt")])
DESCRIPTION = CacheDescription(
    vae="a vae",
    resolution=512,
    buckets={"divisor": 64, "max_aspect_ratio": 2.0},
    center_crop=True,
    flipped=True,
    dtype="float16",
    latent_shapes={"16x24": [4, 2, 3]},
    encoders="two encoders",
    captions=CAPTIONS.description(),
)
RUN = {
    "identity": {"vae": "a vae", "text": "two encoders"},
    "resolution": 512,
    "buckets": {"divisor": 64, "max_aspect_ratio": 2.0},
    "center_crop": True,
    "random_flip": True,
    "captions": CAPTIONS,
}


@pytest.mark.parametrize("description", [DESCRIPTION, replace(DESCRIPTION, encoders=None, captions=None, buckets=None)])
def test_written_and_read(description, tmp_path):
    description.write(tmp_path)
    assert CacheDescription.read(tmp_path) == description
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_the_checksum_tells_caches_apart_and_stays(tmp_path):
    """Cached shards hold it, so neither reading the description nor a field that is not set may change it."""
    DESCRIPTION.write(tmp_path)
    assert (
        CacheDescription.read(tmp_path).checksum()
        == DESCRIPTION.checksum()
        == "blake2b:4c77c3cc0d57700597f894d68bd07602"
    )
    assert replace(DESCRIPTION, mask=None, vae_tiling=False).checksum() == DESCRIPTION.checksum()
    changes = [{"vae": "other"}, {"encoders": "other"}, {"resolution": 256}, {"mask": "alpha"}, {"captions": {}}]
    assert len({replace(DESCRIPTION, **change).checksum() for change in [{}, *changes]}) == 6


def test_what_is_cached():
    assert DESCRIPTION.cached == {"latents", "text"}
    assert replace(DESCRIPTION, encoders=None, captions=None).cached == {"latents"}


def test_the_same_has_no_differences():
    captions = json.loads(json.dumps(DESCRIPTION.captions))
    assert DESCRIPTION.differences(replace(DESCRIPTION, captions=captions)) == []
    DESCRIPTION.check("cache", **RUN)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"identity": {"vae": "other"}}, 'latents.vae: "a vae" in the cache, "other" here'),
        (
            {"identity": {"text": "one encoder"}},
            'text.encoders: "two encoders" in the cache, "one encoder" here',
        ),
        ({"resolution": 768}, "latents.resolution: 512 in the cache, 768 here"),
        ({"buckets": None}, 'latents.buckets: {"divisor": 64, "max_aspect_ratio": 2.0} in the cache, null here'),
        (
            {"buckets": {"divisor": 32, "max_aspect_ratio": 2.0}},
            "latents.buckets.divisor: 64 in the cache, 32 here",
        ),
        ({"background": "white"}, 'latents.background: null in the cache, "white" here'),
        ({"center_crop": False}, "latents.center_crop: true in the cache, false here"),
        (
            {"captions": Captions([CaptionSource("txt")], prefix="a drawing of ")},
            'text.captions.prefix: "" in the cache, "a drawing of " here',
        ),
        (
            {"captions": Captions([CaptionSource("json", key="alt")])},
            'text.captions.sources.0.key: "caption" in the cache, "alt" here',
        ),
    ],
)
def test_a_run_that_differs_is_refused(changes, line):
    with pytest.raises(UserError) as caught:
        DESCRIPTION.check("some/cache", **RUN | changes)
    message = str(caught.value)
    assert line in message
    assert "some/cache" in message
    assert "lit-lora cache --config" in message


def test_all_differences_are_listed():
    with pytest.raises(UserError) as caught:
        DESCRIPTION.check("cache", **RUN | {"resolution": 256, "center_crop": False})
    assert str(caught.value).count(" in the cache, ") == 2


def test_flipped_images_are_required_only_by_runs_that_flip():
    DESCRIPTION.check("cache", **RUN | {"random_flip": False})
    with pytest.raises(UserError, match="flipped: false in the cache, true here"):
        replace(DESCRIPTION, flipped=False).check("cache", **RUN)
    replace(DESCRIPTION, flipped=False).check("cache", **RUN | {"random_flip": False})


def test_without_cached_text_captions_and_encoders_are_not_compared():
    latents = replace(DESCRIPTION, encoders=None, captions=None)
    latents.check("cache", **RUN | {"captions": Captions(dropout=0.5), "identity": {"vae": "a vae", "text": "other"}})


def test_a_part_of_unknown_identity_is_not_compared():
    DESCRIPTION.check("cache", **RUN | {"identity": {"text": "two encoders"}})
    DESCRIPTION.check("cache", **RUN | {"identity": None})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not a description of a cache"),
        (b"[]", "is not a description of a cache"),
        (b'{"format": "lit_lora.cache", "version": 2, "latents": {"vae": ""}, "text": null}', "is not a description"),
        (b'{"format": "lit_lora.cache", "version": 1}', "version 1, not 'lit_lora.cache', version 2"),
        (b'{"format": "other", "version": 1}', "format 'other'"),
    ],
)
def test_files_that_are_something_else(data, message, tmp_path):
    (tmp_path / "cache.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        CacheDescription.read(tmp_path)


def test_no_description(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*cache.json: No such file"):
        CacheDescription.read(tmp_path)
