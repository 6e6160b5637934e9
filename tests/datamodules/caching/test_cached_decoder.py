from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from lit_lora.datamodules.caching.cached_decoder import CachedDecoder, encode_cached
from lit_lora.datamodules.caching.latent_cache import CacheDescription
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.indexing.scan import scan_shard

DESCRIPTION = CacheDescription(
    vae="v",
    resolution=16,
    buckets=None,
    center_crop=True,
    flipped=True,
    dtype="float16",
    latent_shapes={"16x24": [4, 2, 3]},
    encoders="e",
    captions=Captions().description(),
)
FRAMING = Framing(center_crop=True, random_flip=True, seed=3)
EMPTY = {"hidden": torch.full((5, 6), 9.0, dtype=torch.bfloat16), "pooled": torch.full((6,), 9.0)}
SIZE = (16, 24)


def _tensors():
    generator = torch.Generator().manual_seed(0)
    names = ("latents_mean", "latents_std", "latents_mean_flipped", "latents_std_flipped")
    tensors = {name: torch.randn(4, 2, 3, generator=generator).half() for name in names}
    return tensors | {
        "original_size": torch.tensor((40, 61)),
        "crop_top_left": torch.tensor((0, 2)),
        "target_size": torch.tensor(SIZE),
    }


def _text():
    return {name: torch.ones_like(value) for name, value in EMPTY.items()}


def _members(**changes):
    return {"safetensors": encode_cached(_tensors() | changes, _text(), 61, 40), "txt": b"a fox\n"}


@pytest.fixture
def decoder():
    return CachedDecoder(DESCRIPTION, FRAMING, Captions(), EMPTY)


def test_contract(decoder):
    tensors = _tensors()
    slot = next(slot for slot in range(100) if not FRAMING.flips(slot))
    entries = decoder(_members(), slot, SIZE, (61, 40))
    assert entries.pop("caption") == "a fox"
    torch.testing.assert_close(entries.pop("text_embeddings"), _text(), rtol=0, atol=0)
    names = {"latents_mean", "latents_std", "original_size", "crop_top_left", "target_size"}
    torch.testing.assert_close(entries, {name: tensors[name] for name in names}, rtol=0, atol=0)
    assert decoder.batch_entries() == {"empty_text_embeddings": EMPTY}
    assert decoder.extensions == ("safetensors", "txt")


def test_the_same_occurrences_are_flipped_as_without_a_cache(decoder):
    tensors, members = _tensors(), _members()
    mirrored = 0
    for slot in range(60):
        side = "_flipped" if FRAMING.flips(slot) else ""
        mirrored += bool(side)
        entries = decoder(members, slot, SIZE, (61, 40))
        for name in ("latents_mean", "latents_std"):
            assert torch.equal(entries[name], tensors[name + side])
    assert 10 < mirrored < 50
    still = CachedDecoder(DESCRIPTION, replace(FRAMING, random_flip=False), Captions(), EMPTY)
    assert all(
        torch.equal(still(members, slot, SIZE, (61, 40))["latents_mean"], tensors["latents_mean"]) for slot in range(20)
    )


def test_captions_are_drawn_where_text_is_not_cached():
    captions = Captions(dropout=0.5)
    description = replace(DESCRIPTION, encoders=None, captions=None)
    decoder = CachedDecoder(description, FRAMING, captions)
    assert decoder.extensions == ("safetensors", "txt", "json")
    members = {"safetensors": encode_cached(_tensors(), {}, 61, 40), "json": json.dumps({"caption": "x"}).encode()}
    shown = [decoder(members, slot, SIZE, (61, 40)) for slot in range(40)]
    assert [entries["caption"] for entries in shown] == [captions.draw(members, FRAMING.seed, s) for s in range(40)]
    assert {entries["caption"] for entries in shown} == {"", "x"}
    assert all("text_embeddings" not in entries for entries in shown)
    assert decoder.batch_entries() == {}


def test_blank_has_the_shapes_of_a_sample(decoder):
    def shapes(entries):
        text = entries.pop("text_embeddings")
        assert isinstance(entries.pop("caption"), str)
        return {name: (value.shape, value.dtype) for name, value in (entries | text).items()}

    assert shapes(decoder.blank(SIZE)) == shapes(decoder(_members(), 0, SIZE, (61, 40)))


def _without(name):
    tensors = load(_members()["safetensors"])
    del tensors[name]
    return save(tensors)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff" * 40, "cannot be read"),
        (_members()["safetensors"][:-3], "cannot be read"),
        (_without("latents_std"), "latents_std is missing"),
        (_without("crop_top_left"), "crop_top_left is missing"),
        (_without("text.pooled"), "text.pooled is missing"),
        (
            _members(latents_mean=torch.zeros(4, 3, 2).half())["safetensors"],
            r"latents_mean is float16 \(4, 3, 2\), not float16 \(4, 2, 3\)",
        ),
        (_members(latents_std=torch.zeros(4, 2, 3))["safetensors"], r"latents_std is float32 .* not float16"),
        (_members(original_size=torch.tensor((1, 2, 3)))["safetensors"], r"original_size is int64 \(3,\)"),
        (
            _members(target_size=torch.tensor((24, 16)))["safetensors"],
            r"cached with height and width \(24, 16\), not \(16, 24\)",
        ),
    ],
)
def test_damaged_samples(decoder, member, message):
    still = CachedDecoder(DESCRIPTION, replace(FRAMING, random_flip=False), Captions(), EMPTY)
    with pytest.raises(BadSampleError, match=message):
        still({"safetensors": member, "txt": b"x"}, 0, SIZE, (61, 40))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(decoder, value):
    tensors = {**_tensors(), **{f"text.{name}": tensor for name, tensor in _text().items()}}
    for name in ("latents_mean", "text.pooled"):
        spoiled = {**tensors, name: tensors[name].clone()}
        spoiled[name].view(-1)[1] = value
        still = CachedDecoder(DESCRIPTION, replace(FRAMING, random_flip=False), Captions(), EMPTY)
        with pytest.raises(BadSampleError, match=f"{name} has values that are not finite"):
            still({"safetensors": save(spoiled), "txt": b"x"}, 0, SIZE, (61, 40))
    with pytest.raises(BadSampleError, match="latents_std has values that are not finite"):
        encode_cached(_tensors() | {"latents_std": torch.full((4, 2, 3), value)}, {}, 61, 40)


def test_missing_members(decoder):
    members = _members()
    for name in members:
        with pytest.raises(BadSampleError, match=f"no .{name} member"):
            decoder({other: data for other, data in members.items() if other != name}, 0, SIZE, (61, 40))


def test_bytes_depend_on_the_values_alone():
    assert len({encode_cached(_tensors(), _text(), 61, 40) for _ in range(20)}) == 1
    assert len({encode_cached(_tensors(), _text(), width, 40) for width in (60, 61)}) == 2


def test_the_index_finds_the_size_of_the_image(tmp_path, write_tar):
    members = {f"{key}.safetensors": encode_cached(_tensors(), _text(), 61, 40) for key in "ab"}
    assert scan_shard(write_tar(tmp_path / "x.tar", members)).sizes == [(61, 40)] * 2
