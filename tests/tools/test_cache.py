"""Caching, and training from the cache."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from lightning.pytorch import LightningDataModule, Trainer
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lit_lora.cli import main
from lit_lora.datamodules import EditDecoder, ShardSet, WebDatasetDataModule
from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
from lit_lora.datamodules.caching.cache_writer import CacheWriter
from lit_lora.datamodules.caching.cached_decoder import CachedDecoder
from lit_lora.datamodules.caching.latent_cache import CacheDescription
from lit_lora.datamodules.caching.open_cache import open_cache
from lit_lora.datamodules.decoding.captions import Captions, CaptionSource
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.loading.dataset import ShardDataset, SlotRequest
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import (
    Flux,
    FluxKontext,
    ModelFamily,
    QwenImage,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
)
from lit_lora.loss_mask import mask_of_latents
from lit_lora.memory.one_on_device import OneOnDevice
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import NF4
from lit_lora.sampling import SamplingOptions
from lit_lora.tools import cache_work
from lit_lora.tools.cache import cache_shards
from tests.datamodules.faulty_server import FaultyServer
from tests.families.folders import FOLDERS
from tests.test_module import Losses
from tests.warm_python import WarmPython, warm_context

FAMILIES = list(FOLDERS.items())
BUCKETS = AspectRatioBuckets(divisor=4)
SIZES = ((20, 20), (33, 17), (18, 30), (24, 23), (40, 20))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of five images of several shapes."""
    for shard in range(3):
        write_shard(tmp_path / "shards" / f"shard-{shard:06}.tar", range(5 * shard, 5 * shard + 5))
    return tmp_path / "shards"


def write_shard(path: Path, numbers: range, **damaged: bytes) -> None:
    """Keys ``k00`` and so on; ``damaged`` has bytes to write in place of an image."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            buffer = io.BytesIO()
            width, height = SIZES[number % len(SIZES)]
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            key = f"k{number:02}"
            members = {"png": damaged.get(key, buffer.getvalue()), "txt": f"a red star {number}\n".encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def module_for(family_class: type[ModelFamily], folder: Path, **options: Any) -> LoraDiffusion:
    torch.manual_seed(0)
    options = {"base_dtype": "float32"} | options
    return LoraDiffusion(family_class(str(folder)), LoraConfig(r=2, lora_alpha=2), **options)


def data_for(shards: Path, decoder: dict[str, Any] | None = None, **options: Any) -> WebDatasetDataModule:
    options = {"batch_size": 2, "resolution": 16, "num_workers": 0, "seed": 4} | options
    return WebDatasetDataModule(str(shards), decoder=ImageDecoder(**{"center_crop": True} | (decoder or {})), **options)


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def failure(module: LoraDiffusion, data: LightningDataModule, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        cache_shards(module, data, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family_class", "fixture", "buckets", "text"),
    [
        (StableDiffusion, "sd_folder", BUCKETS, True),
        (StableDiffusion, "sd_folder", None, False),
        (StableDiffusionXL, "sdxl_folder", BUCKETS, False),
        (StableDiffusionXL, "sdxl_folder", None, True),
    ],
)
def test_training_from_the_cache_equals_training_without(
    family_class: type[ModelFamily],
    fixture: str,
    buckets: AspectRatioBuckets | None,
    text: bool,
    shards: Path,
    tmp_path: Path,
    trainer_options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    whole = request.getfixturevalue(fixture)
    bare = tmp_path / "base"  # has no weights of what is cached
    shutil.copytree(whole, bare)
    for part in ("vae", "text_encoder*") if text else ("vae",):
        for file in bare.glob(f"{part}/*.safetensors"):
            file.unlink()

    def losses(folder: Path, source: Path) -> list[float]:
        module = module_for(family_class, folder, caption_dropout=0.4)
        data = data_for(source, {"random_flip": True}, buckets=buckets, val_samples=3)
        recorder = Losses()
        trainer = Trainer(**trainer_options, max_steps=8, callbacks=[recorder])
        trainer.fit(module, data)
        return [*recorder.losses, float(trainer.callback_metrics["val/loss"])]

    expected = losses(whole, shards)
    data = data_for(shards, {"random_flip": True}, buckets=buckets)
    cache_shards(module_for(family_class, whole), data, text=text, dtype="float32", batch_size=4)
    shutil.move(shards / "cache", tmp_path / "cache")
    shutil.rmtree(shards)
    assert losses(bare, tmp_path / "cache") == pytest.approx(expected, rel=1e-5)


def test_in_batches_of_the_same_size_the_losses_are_equal(
    sd_folder: Path, shards: Path, trainer_options: dict[str, Any]
) -> None:
    """The VAE rounds differently in batches of other sizes; nothing else differs from training without a cache."""

    def losses(source: Path) -> list[float]:
        module, data, recorder = (
            module_for(StableDiffusion, sd_folder),
            data_for(source, batch_size=1, val_samples=1),
            Losses(),
        )
        Trainer(**trainer_options, max_steps=6, callbacks=[recorder]).fit(module, data)
        return recorder.losses

    expected = losses(shards)
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards), dtype="float32", batch_size=1)
    assert losses(shards / "cache") == expected


def test_predicting_from_the_cache(sd_folder: Path, shards: Path, trainer_options: dict[str, Any]) -> None:
    options: dict[str, Any] = {"resolution": 32, "buckets": AspectRatioBuckets(divisor=8)}
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards, **options))

    def drawn(source: Path) -> list[tuple[tuple[int, int], bytes]]:
        module = module_for(StableDiffusion, sd_folder, sampling=SamplingOptions(num_inference_steps=2))
        data = data_for(source, val_samples=4, **options)
        batches = Trainer(**trainer_options).predict(module, data)
        return [(image.size, image.tobytes()) for images in batches or [] for image in images]

    images = drawn(shards)
    assert len({size for size, _ in images}) > 1
    assert drawn(shards / "cache") == images


@pytest.mark.parametrize(("family_class", "fixture"), FAMILIES)
def test_what_is_in_a_cache(
    family_class: type[ModelFamily], fixture: str, shards: Path, request: pytest.FixtureRequest
) -> None:
    """Each sample has what encoding it alone gives, mirrored or not."""
    module = module_for(family_class, request.getfixturevalue(fixture))
    data = data_for(shards, {"random_flip": True}, buckets=BUCKETS)
    summary = cache_shards(module, data, dtype="float32", batch_size=3)
    assert not list(module.family.parameters())
    module.family.load(torch.float32, without={"denoiser"})
    assert summary[:3] == (3, 0, 15)
    assert summary.bad == []
    folder = shards / "cache"
    assert summary.size == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert summary.arguments == {"train_shards": str(folder)}

    for path in folder.glob("*.tar"):
        names = [name.replace(".png", ".safetensors") for name in members_of(shards / path.name)]
        assert list(members_of(path)) == names
        assert path.with_name(path.name + ".index").exists()
    description = CacheDescription.read(folder)
    sizes = {"20x12": (20, 12), "16x16": (16, 16), "12x20": (12, 20)}
    assert description.latent_shapes == {name: [*module.family.latent_shape(*size)] for name, size in sizes.items()}
    framing = Framing(center_crop=True, random_flip=True, seed=4)
    source, cached = open_table(str(shards)), open_table(str(folder))
    decoder = CachedDecoder(description, framing, Captions(), load_file(folder / "empty.safetensors"))
    live_decoder = ImageDecoder(center_crop=True, random_flip=True).with_seed(4)
    bucketing = Bucketing.of(16, BUCKETS)
    width, height = cached.image_sizes(np.arange(3))
    buckets = bucketing.assign(width, height)
    assert np.array_equal(buckets, bucketing.assign(*source.image_sizes(np.arange(3))))
    assert len(set(buckets.tolist())) > 2
    for sample in range(15):
        request_ = [SlotRequest(sample, 1.0, 100 + sample, tuple(bucketing.sizes[buckets[sample]].tolist()))]
        ours = ShardDataset(ShardReader(cached), decoder).__getitems__(request_)
        live = ShardDataset(ShardReader(source), live_decoder).__getitems__(request_)
        for name in ("original_size", "crop_top_left", "target_size"):
            assert torch.equal(ours[name], live[name])
        assert ours["caption"] == live["caption"]
        assert ours["key"] == live["key"]
        with torch.no_grad():
            mean, std = module.family.posterior(live["pixel_values"])
            text = module.family.encode_captions(live["caption"])
        for name, mask in module.family.text_masks.items():  # padding comes back as zeros
            text[name] = text[name] * text[mask].view(*text[mask].shape, *[1] * (text[name].ndim - 2))
        torch.testing.assert_close(ours["latents_mean"], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["latents_std"], std, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["text_embeddings"], text, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        empty = {name: value[0] for name, value in module.family.encode_captions([""]).items()}
    torch.testing.assert_close(decoder.batch_entries()["empty_text_embeddings"], empty)


@pytest.mark.parametrize("source", ["alpha", "mask.png"])
def test_masks(source: Any, sd_folder: Path, tmp_path: Path) -> None:
    """The masks of a cache are those of a run without it, at the size of the latents, also of flipped images."""
    with tarfile.open(_folder(tmp_path / "shards") / "shard.tar", "w") as archive:
        for number, (width, height) in enumerate(SIZES):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 4), dtype=np.uint8)
            files = {"png": Image.fromarray(pixels), "mask.png": Image.fromarray(pixels[..., 3])}
            buffers: dict[str, io.BytesIO] = {name: io.BytesIO() for name in files}
            for name, image in files.items():
                image.save(buffers[name], "PNG")
            for name, data in {**{n: b.getvalue() for n, b in buffers.items()}, "txt": b"a star"}.items():
                add_member(archive, f"{number}.{name}", data)
    options: dict[str, Any] = {"decoder": {"random_flip": True, "mask": source}, "buckets": BUCKETS, "batch_size": 1}
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(tmp_path / "shards", **options))
    flips = 0
    batches = []
    for folder in (tmp_path / "shards", tmp_path / "shards" / "cache"):
        data = data_for(folder, **options)
        data.setup("fit")
        batches.append([batch for _ in range(2) for batch in data.train_dataloader()])
    for live, cached in zip(*batches, strict=True):
        assert live["slot"] == cached["slot"]
        assert cached["loss_mask"].shape[1:] == (1, *cached["latents_mean"].shape[2:])
        assert torch.equal(mask_of_latents(live["loss_mask"], cached["latents_mean"].shape[2:]), cached["loss_mask"])
        flips += ImageDecoder(random_flip=True).with_seed(4).framing.flips(live["slot"][0])
    assert 0 < flips < len(batches[0])
    data = data_for(tmp_path / "shards" / "cache", **options | {"decoder": {}})
    data.setup("fit")  # a run without masks reads the same cache
    assert "loss_mask" not in next(iter(data.train_dataloader()))


def test_a_cache_without_masks_does_not_fit_a_run_with_them(sd_folder: Path, shards: Path) -> None:
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    with pytest.raises(UserError, match=r'latents.mask: null in the cache, "alpha" here'):
        data_for(shards / "cache", {"mask": "alpha"}).setup("fit")


def test_a_shard_that_is_made_in_several_goes(
    sd_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "one" / "shard.tar", range(15))
    data = data_for(tmp_path / "one", buckets=BUCKETS)
    monkeypatch.setattr("lit_lora.datamodules.caching.cache_writer._BATCHES_AT_A_TIME", 2)
    cache_shards(module_for(StableDiffusion, sd_folder), data, batch_size=2)
    names = [name for name in members_of(tmp_path / "one" / "cache" / "shard.tar") if "safetensors" in name]
    assert names == [f"k{number:02}.safetensors" for number in range(15)]


def test_precision_of_what_is_cached(sd_folder: Path, shards: Path) -> None:
    def dtypes(folder: str, base_dtype: str, **options: Any) -> tuple[str, torch.dtype, torch.dtype]:
        out = shards.parent / folder
        cache_shards(
            module_for(StableDiffusion, sd_folder, base_dtype=base_dtype), data_for(shards), str(out), **options
        )
        tensors = next(data for name, data in members_of(out / "shard-000000.tar").items() if "safetensors" in name)
        (out / "sample").write_bytes(tensors)
        sample = load_file(out / "sample")
        described = CacheDescription.read(out).dtype
        return described, sample["latents_mean"].dtype, sample["text.encoder_hidden_states"].dtype

    assert dtypes("a", "bfloat16") == ("bfloat16", torch.bfloat16, torch.bfloat16)
    assert dtypes("b", "float32") == ("float16", torch.float16, torch.float32)
    assert dtypes("c", "bfloat16", dtype="float32") == ("float32", torch.float32, torch.bfloat16)


def test_latents_alone(sd_folder: Path, shards: Path) -> None:
    captions = Captions([CaptionSource("txt")], dropout=0.5, prefix="an image of ")
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards, {"captions": captions}), text=False)
    folder = shards / "cache"
    assert CacheDescription.read(folder).cached == {"latents"}
    assert not (folder / "empty.safetensors").exists()
    members, source = members_of(folder / "shard-000001.tar"), members_of(shards / "shard-000001.tar")
    assert members["k05.txt"] == source["k05.txt"]
    (shards / "sample").write_bytes(members["k05.safetensors"])
    names = {"latents_mean", "latents_std", "original_size", "crop_top_left", "target_size"}
    assert set(load_file(shards / "sample")) == names


def test_captions_as_they_are_trained(sd_folder: Path, shards: Path) -> None:
    captions = Captions([CaptionSource("txt", template="this is {}")], suffix="!")
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards, {"captions": captions}))
    assert members_of(shards / "cache" / "shard-000001.tar")["k05.txt"] == b"this is a red star 5!"


def test_an_interrupted_run_goes_on(
    sd_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards), str(tmp_path / "whole"))
    write = CacheWriter.write
    out = tmp_path / "out"

    def interrupted(self: CacheWriter, shard: int, path: Path, progress: Any) -> Any:
        if shard == 2:
            for name in (path.name, "cache.json", "bad.jsonl", "empty.safetensors"):
                path.with_name(f"{name}.123.part").write_text("left over by a kill")
            raise KeyboardInterrupt
        return write(self, shard, path, progress)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards), str(out))
    # What is there is no cache yet.
    assert not (out / "cache.json").exists()
    assert len(tars(out)) == 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    message = failure(module_for(StableDiffusion, sd_folder), data_for(shards, resolution=32), out=str(out))
    assert "latents.resolution: 16 in the cache, 32 here" in message

    summary = cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards), str(out))
    assert summary[:3] == (3, 2, 15)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert tars(out) == tars(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert "cache.unfinished.json" not in names


def test_shards_that_are_added_later(sd_folder: Path, shards: Path) -> None:
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    write_shard(shards / "shard-000003.tar", range(15, 18))
    summary = cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    assert summary[:3] == (4, 3, 18)
    assert len(open_table(str(shards / "cache"))) == 18
    (shards / "cache" / "shard-000003.tar").unlink()
    with pytest.warns(
        UserWarning, match=r"cache lacks 1 of the shards that its manifest.json lists, first shard-000003.tar"
    ):
        open_table(str(shards / "cache"))


def test_the_rest_of_a_cache_in_another_precision(sd_folder: Path, shards: Path) -> None:
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    other = module_for(StableDiffusion, sd_folder, base_dtype="bfloat16")
    (shards / "cache" / "shard-000001.tar").unlink()
    message = failure(other, data_for(shards), dtype="float16")
    assert 'latents.base_dtype: "float32" in the cache, "bfloat16" here' in message
    assert cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))[:2] == (3, 2)


def test_the_rest_of_a_cache_whose_empty_caption_is_damaged(sd_folder: Path, shards: Path) -> None:
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    (shards / "cache" / "shard-000001.tar").unlink()
    (shards / "cache" / "empty.safetensors").write_bytes(b"damaged")
    message = failure(module_for(StableDiffusion, sd_folder), data_for(shards))
    assert re.search("empty.safetensors cannot be read .*; remove the cache and make it anew", message)


@pytest.mark.parametrize("later", [-(10**9), 1, 0])
@pytest.mark.parametrize("out", [False, True])
def test_shards_that_are_replaced_later(later: int, out: bool, sd_folder: Path, shards: Path, tmp_path: Path) -> None:
    """By one of another size, or of the same size with an older, newer or the same time."""
    module, folder = module_for(StableDiffusion, sd_folder), str(tmp_path / "out") if out else None
    cache_shards(module, data_for(shards), folder)
    source, cached = shards / "shard-000001.tar", Path(folder or shards / "cache") / "shard-000001.tar"
    time, data = source.stat().st_mtime_ns, source.read_bytes()
    source.write_bytes(data.replace(b"star 7", b"moon 7") if later else data + bytes(10240))
    os.utime(source, ns=(time + later, time + later))
    told = rf"{source} was changed after {cached} was made from it, .* remove {cached} to encode it anew$"
    assert re.search(told, failure(module, data_for(shards), out=folder))
    with pytest.warns(UserWarning, match=rf"1 of 3 shards .* among them {source}, were changed after the cache"):
        open_cache(open_table(str(cached.parent)))
    cached.unlink()
    assert cache_shards(module, data_for(shards), folder).resumed == 2
    open_cache(open_table(str(cached.parent)))  # a warning would be an error


def test_copies_with_other_times(
    sd_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold the same, which is told where it is too much to compare at each start."""
    module = module_for(StableDiffusion, sd_folder)
    cache_shards(module, data_for(shards))
    for source in shards.glob("*.tar"):
        os.utime(source, ns=(10**18, 10**18))
    shutil.copytree(shards, tmp_path / "copy")
    for path in tmp_path.glob("copy/*.tar"):
        os.utime(path)
    for folder in (shards, tmp_path / "copy"):
        open_cache(open_table(str(folder / "cache")))  # a warning would be an error
    with monkeypatch.context() as patched:
        patched.setattr("lit_lora.datamodules.caching.sources._COMPARED_BYTES", 1)
        with pytest.warns(UserWarning, match="3 shards have other times .* 1 of them were compared.* lit-lora cache"):
            open_cache(open_table(str(shards / "cache")))
        assert cache_shards(module, data_for(shards)).resumed == 3
        open_cache(open_table(str(shards / "cache")))


def test_caches_without_records_compare_times(sd_folder: Path, shards: Path) -> None:
    module = module_for(StableDiffusion, sd_folder)
    cache_shards(module, data_for(shards))
    for record in shards.glob("cache/*.source.json"):
        record.unlink()
    source, cached = shards / "shard-000001.tar", shards / "cache" / "shard-000001.tar"
    later = cached.stat().st_mtime_ns + 1
    os.utime(source, ns=(later, later))
    told = rf"{source} was changed after {cached} was made from it, .* remove {cached} to encode it anew, or touch it"
    assert re.search(told, failure(module, data_for(shards)))
    with pytest.warns(UserWarning, match=rf"1 of 3 shards .* among them {source}, were changed after the cache"):
        open_cache(open_table(str(shards / "cache")))
    os.utime(cached, ns=(later, later))
    assert cache_shards(module, data_for(shards)).resumed == 3
    open_cache(open_table(str(shards / "cache")))


def test_a_shard_that_is_changed_while_it_is_cached(
    sd_folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = CacheWriter._encode

    def touch_after(self: CacheWriter, *arguments: Any) -> Any:
        yield from encode(self, *arguments)
        os.utime(shards / "shard-000000.tar", ns=(1, 1))

    monkeypatch.setattr(CacheWriter, "_encode", touch_after)
    message = failure(module_for(StableDiffusion, sd_folder), data_for(shards))
    assert message == f"{shards / 'shard-000000.tar'} was changed while it was cached; run lit-lora cache again"
    assert not list(shards.glob("cache/*.tar"))


def test_remote_shards_that_are_added_and_replaced(
    sd_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one whose bytes cannot be compared, keys, sizes and offsets are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module, out = module_for(StableDiffusion, sd_folder), tmp_path / "out"
    DataIndex.load_or_build(sorted(shards.glob("*.tar")))
    with FaultyServer(shards) as server:
        url = f"{server.url}/shard-*.tar"
        cache_shards(module, data_for(url), str(out))
        write_shard(shards / "shard-000003.tar", range(15, 18))
        DataIndex.load_or_build(sorted(shards.glob("*.tar")))
        assert cache_shards(module, data_for(url), str(out))[:3] == (4, 3, 18)
        write_shard(shards / "shard-000001.tar", range(5, 10), k07=b"another")
        DataIndex.load_or_build(sorted(shards.glob("*.tar")))
        message = failure(module, data_for(url), out=str(out))
    assert f"shard-000001.tar was changed after {out / 'shard-000001.tar'} was made from it" in message


def test_all_shards_of_a_config_in_their_order(sd_folder: Path, shards: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "val" / "v.tar", range(20, 22))
    train = [str(shards / "shard-00000{1,2}.tar"), str(shards / "shard-000000.tar")]
    data = WebDatasetDataModule(
        train,
        val_shards=str(tmp_path / "val"),
        test_shards=str(tmp_path / "val" / "v.tar"),
        resolution=16,
        decoder=ImageDecoder(center_crop=True),
        num_workers=0,
    )
    summary = cache_shards(module_for(StableDiffusion, sd_folder), data)
    assert summary[:3] == (4, 0, 17)
    cached = shards / "cache"
    assert summary.arguments == {
        "train_shards": [str(cached / "shard-00000{1,2}.tar"), str(cached / "shard-000000.tar")],
        "val_shards": str(tmp_path / "val" / "cache"),
        "test_shards": str(tmp_path / "val" / "cache" / "v.tar"),
    }
    before, after = open_table(train), open_table(summary.arguments["train_shards"])
    assert [after.key(n) for n in range(15)] == [before.key(n) for n in range(15)]
    out = cache_shards(module_for(StableDiffusion, sd_folder), data, str(tmp_path / "out")).arguments
    assert out["train_shards"] == [str(tmp_path / "out" / Path(spec).name) for spec in train]
    assert out["val_shards"] == str(tmp_path / "out")


def test_bad_samples(sd_folder: Path, shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "shard-000001.tar", range(5, 10), k05=b"nothing", k08=b"nothing")
    write_shard(shards / "shard-000002.tar", range(10, 12), k10=b"nothing", k11=b"nothing")
    message = failure(module_for(StableDiffusion, sd_folder), data_for(shards, max_bad_samples=1))
    assert "2 bad samples, more than max_bad_samples=1" in message
    assert f"k05 in {shards / 'shard-000001.tar'}: " in message
    folder = shards / "cache"
    lines = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k05", "k08"]

    for resumed in (2, 2):
        summary = cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards, max_bad_samples=4))
        assert summary[:3] == (2, resumed, 8)
        assert sorted(report.key for report in summary.bad) == ["k05", "k08", "k10", "k11"]
        assert len((folder / "bad.jsonl").read_text().splitlines()) == 4
    assert [name for name in members_of(folder / "shard-000001.tar") if "safetensors" in name] == [
        f"k0{number}.safetensors" for number in (6, 7, 9)
    ]
    assert not (folder / "shard-000002.tar").exists()
    assert len(open_table(str(folder))) == 8


def test_latents_beyond_the_precision_are_bad(sd_folder: Path, shards: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd_folder, base)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    vae.quant_conv.bias.data[0] = 1e6
    vae.save_pretrained(base / "vae")
    message = failure(module_for(StableDiffusion, base), data_for(shards))
    assert "latents_mean has values that are not finite" in message
    assert not list((shards / "cache").glob("*.tar"))
    message = failure(module_for(StableDiffusion, base), data_for(shards, max_bad_samples=15))
    assert "are bad; see" in message
    assert cache_shards(module_for(StableDiffusion, base), data_for(shards), dtype="float32").samples == 15


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_cached_sample_that_is_damaged_later(sd_folder: Path, shards: Path, trainer_options: dict[str, Any]) -> None:
    """It gets weight 0 and a warning, like any other bad sample."""
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    for path in (shards / "cache").glob("*.tar"):
        members = members_of(path)
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                if name == "k07.safetensors":
                    data = data[:-8] + b"\xff" * 8
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = data_for(shards / "cache", batch_size=1, max_bad_samples=1)
    trainer = Trainer(**trainer_options, max_steps=15)
    with pytest.warns(UserWarning, match="bad sample k07 .* not finite"):
        trainer.fit(module_for(StableDiffusion, sd_folder), data)


def other_base(sd_folder: Path, tmp_path: Path, part: str) -> Path:
    folder = tmp_path / f"other_{part}"
    shutil.copytree(sd_folder, folder)
    [file] = folder.glob(f"{part}/*.safetensors")
    tensors = bytearray(file.read_bytes())
    tensors[-1] ^= 1
    file.write_bytes(tensors)
    return folder


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize(
    ("options", "part", "line"),
    [
        ({}, "vae", "latents.vae: "),
        ({}, "text_encoder", "text.encoders: "),
        ({"resolution": 32}, None, "latents.resolution: 16 in the cache, 32 here"),
        ({"decoder": {"center_crop": False}}, None, "latents.center_crop: true in the cache, false here"),
        ({"decoder": {"random_flip": True}}, None, "latents.flipped: false in the cache, true here"),
        ({"buckets": BUCKETS}, None, "latents.buckets: null in the cache"),
        ({"decoder": {"captions": Captions(prefix="x")}}, None, 'text.captions.prefix: "" in the cache, "x" here'),
    ],
)
def test_a_run_with_something_else_is_refused(
    options: dict[str, Any],
    part: str | None,
    line: str,
    sd_folder: Path,
    shards: Path,
    tmp_path: Path,
    trainer_options: dict[str, Any],
) -> None:
    cache_shards(module_for(StableDiffusion, sd_folder), data_for(shards))
    base = other_base(sd_folder, tmp_path, part) if part else sd_folder
    with pytest.raises(UserError) as caught:
        Trainer(**trainer_options, max_steps=1).fit(
            module_for(StableDiffusion, base), data_for(shards / "cache", **options)
        )
    assert line in str(caught.value)
    assert str(shards / "cache") in str(caught.value)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_cache_tells_whether_its_vae_worked_in_tiles(
    tiled: bool, sd_folder: Path, shards: Path, trainer_options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    def module(tiling: bool) -> LoraDiffusion:
        return module_for(StableDiffusion, sd_folder, memory=MemoryOptions(vae_tiling=tiling))

    cache_shards(module(tiled), data_for(shards))
    line = f"latents.vae_tiling: {json.dumps(tiled)} in the cache, {json.dumps(not tiled)} here"
    assert line in failure(module(not tiled), data_for(shards))
    Trainer(**trainer_options, max_steps=1).fit(module(tiled), data_for(shards / "cache"))
    assert not [one for one in recwarn if "vae_tiling" in str(one.message)]
    message = f"made {'with' if tiled else 'without'} model.memory.vae_tiling, which is {json.dumps(not tiled)} here"
    with pytest.warns(UserWarning, match=message):
        Trainer(**trainer_options, max_steps=1).fit(module(not tiled), data_for(shards / "cache"))


@pytest.mark.parametrize("text", [True, False])
def test_a_cache_tells_the_dtype_of_its_encoders(
    text: bool, sd_folder: Path, shards: Path, trainer_options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    def module(dtype: str) -> LoraDiffusion:
        return module_for(StableDiffusion, sd_folder, base_dtype=dtype)

    cache_shards(module("bfloat16"), data_for(shards), text=text)
    assert 'latents.base_dtype: "bfloat16" in the cache, "float32" here' in failure(
        module("float32"), data_for(shards), text=text
    )
    Trainer(**trainer_options, max_steps=1).fit(module("bfloat16"), data_for(shards / "cache"))
    assert not [one for one in recwarn if "base_dtype" in str(one.message)]
    with pytest.warns(UserWarning, match="made with model.base_dtype bfloat16, which is float32 here"):
        Trainer(**trainer_options, max_steps=1).fit(module("float32"), data_for(shards / "cache"))


def test_the_dtype_of_a_vae_of_its_own_is_not_the_bases(
    sdxl_folder: Path, shards: Path, trainer_options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    cache_shards(module_for(StableDiffusionXL, sdxl_folder, base_dtype="bfloat16"), data_for(shards), text=False)
    assert CacheDescription.read(shards / "cache").base_dtype is None
    Trainer(**trainer_options, max_steps=1).fit(module_for(StableDiffusionXL, sdxl_folder), data_for(shards / "cache"))
    assert not [one for one in recwarn if "base_dtype" in str(one.message)]


@pytest.mark.parametrize(
    "family_class", [StableDiffusionXL, StableDiffusion3, Flux, QwenImage], ids=lambda c: c.__name__
)
def test_one_encoder_at_a_time_is_on_the_device(
    family_class: type[ModelFamily],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(FOLDERS[family_class])
    cache_shards(module_for(family_class, folder), data_for(shards), out=str(tmp_path / "together"))
    keepers: list[OneOnDevice] = []
    owners: dict[nn.Module, str] = {}
    seen: list[str] = []

    class Watched(OneOnDevice):
        def __init__(self, models: Any, device: torch.device) -> None:
            super().__init__(models, device)
            keepers.append(self)
            owners.update({part: name for name, model in models.items() for part in model.modules()})

        def bring(self, names: Any) -> None:
            super().bring(names)
            assert len(self.on_device) == 1
            seen.extend(self.on_device)

    def check(module: nn.Module, inputs: Any) -> None:
        assert set(keepers[0].on_device) == {owners[module]}

    monkeypatch.setattr(cache_work, "OneOnDevice", Watched)
    monkeypatch.setattr(cache_work, "_devices", lambda device: ["cpu:0"])  # like any device beside the host's
    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        cache_shards(module_for(family_class, folder), data_for(shards), out=str(tmp_path / "in_turn"))
    finally:
        hook.remove()
    assert tars(tmp_path / "in_turn") == tars(tmp_path / "together")
    empty = [(tmp_path / out / "empty.safetensors").read_bytes() for out in ("in_turn", "together")]
    assert empty[0] == empty[1]
    encoders = [name for name in family_class.encoder_classes if name.startswith("text_encoder")]
    assert seen == [*encoders, *["vae", *encoders] * 3]


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_text_encoders_that_are_quantized_for_the_cache(
    sd_folder: Path, shards: Path, tmp_path: Path, trainer_options: dict[str, Any]
) -> None:
    memory = MemoryOptions(text_encoder_quantization=NF4())
    for out, options in (("full", {}), ("nf4", {"memory": memory})):
        cache_shards(module_for(StableDiffusion, sd_folder, **options), data_for(shards), out=str(tmp_path / out))
    full, quantized = (load_file(tmp_path / out / "empty.safetensors") for out in ("full", "nf4"))
    assert not torch.equal(full["encoder_hidden_states"], quantized["encoder_hidden_states"])
    torch.testing.assert_close(full["encoder_hidden_states"], quantized["encoder_hidden_states"], rtol=0, atol=0.5)
    line = 'text.text_quantization: "NF4(block_size=64, double_quant=True, skip=())" in the cache, null here'
    data = data_for(tmp_path / "nf4")
    with pytest.raises(UserError, match=re.escape(line)):
        Trainer(**trainer_options, max_steps=1).fit(module_for(StableDiffusion, sd_folder), data)
    module = module_for(StableDiffusion, sd_folder, memory=memory)
    Trainer(**trainer_options, max_steps=1).fit(module, data_for(tmp_path / "nf4"))
    assert module.family.encoders == {}
    (tmp_path / "nf4" / "shard-000002.tar").unlink()
    message = failure(module_for(StableDiffusion, sd_folder), data_for(shards), out=str(tmp_path / "nf4"))
    assert line in message


def test_sets_with_captions_of_their_own(sd_folder: Path, shards: Path, tmp_path: Path) -> None:
    """From their caches, batches have the same samples and captions as without."""
    write_shard(tmp_path / "more" / "shard-000000.tar", range(15, 19))

    def data(*folders: str | list[str]) -> WebDatasetDataModule:
        crop = ImageDecoder(center_crop=True)
        sks = ImageDecoder(center_crop=True, captions=Captions(prefix="sks "))
        sets = [ShardSet(folders[0], 0.5, crop), ShardSet(folders[1], 2, sks, prior=True)]
        return WebDatasetDataModule(train_sets=sets, resolution=16, batch_size=2, num_workers=0)

    module = module_for(StableDiffusion, sd_folder)
    live = data(str(shards), str(tmp_path / "more"))
    summary = cache_shards(module, live, str(tmp_path / "out"))
    assert summary.samples == 19
    folders = [str(tmp_path / "out" / name) for name in "01"]
    assert summary.arguments == {"train_sets": folders}
    cached = data(*folders)
    for one in (live, cached):
        one.setup("fit")
    assert cached.cached == {"latents", "text"}
    names = ("key", "caption", "slot", "prior")
    seen = [[[batch[name] for name in names] for batch in one.train_dataloader()] for one in (live, cached)]
    assert seen[0] == seen[1]
    assert sum(map(sum, (batch[3] for batch in seen[1]))) == 8


class TestRefusals:
    """Each names what to do, and nothing is written."""

    @pytest.fixture
    def module(self, sd_folder: Path) -> LoraDiffusion:
        return module_for(StableDiffusion, sd_folder)

    def test_random_crops(self, module: LoraDiffusion, shards: Path) -> None:
        assert "set --data.init_args.decoder.center_crop true" in failure(
            module, data_for(shards, {"center_crop": False})
        )
        assert not (shards / "cache").exists()

    def test_a_decoder_of_its_own(self, module: LoraDiffusion, shards: Path) -> None:
        class OwnDecoder(ImageDecoder):
            pass

        data = WebDatasetDataModule(str(shards), decoder=OwnDecoder(center_crop=True))
        assert "decoder is a OwnDecoder, whose samples cannot be cached; use an ImageDecoder" in failure(module, data)
        assert not (shards / "cache").exists()

    def test_captions_that_vary(self, module: LoraDiffusion, shards: Path) -> None:
        assert "--text false" in failure(module, data_for(shards, {"captions": Captions(dropout=0.1)}))
        assert "--text false" in failure(module, data_for(shards, {"captions": Captions(shuffle_tags=True)}))
        assert not (shards / "cache").exists()

    def test_nothing_to_cache(self, module: LoraDiffusion) -> None:
        assert "set train_shards" in failure(module, WebDatasetDataModule(decoder=ImageDecoder(center_crop=True)))

    def test_another_datamodule(self, module: LoraDiffusion) -> None:
        assert "data is a LightningDataModule" in failure(module, LightningDataModule())

    def test_numbers(self, module: LoraDiffusion, shards: Path) -> None:
        assert "jobs=0 is too small; it must be at least 1" in failure(module, data_for(shards), jobs=0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, module: LoraDiffusion, shards: Path) -> None:
        assert "needs a GPU, and this machine has none" in failure(module, data_for(shards), device="cuda")

    def test_samples_without_an_image(self, module: LoraDiffusion, shards: Path, tmp_path: Path) -> None:
        with tarfile.open(shards / "x.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
        assert "1 of 16 samples have no image" in failure(module, data_for(shards))

    def test_a_base_without_weights(self, sd_folder: Path, shards: Path, tmp_path: Path) -> None:
        shutil.copytree(sd_folder, tmp_path / "base")
        for file in (tmp_path / "base" / "vae").glob("*.safetensors"):
            file.unlink()
        message = failure(module_for(StableDiffusion, tmp_path / "base"), data_for(shards))
        assert f"{tmp_path / 'base'} has no weights for vae" in message

    def test_other_shards_in_the_folder(self, module: LoraDiffusion, shards: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write_shard(out / "x.tar", range(2))
        assert "holds shards that are not a cache" in failure(module, data_for(shards), out=str(out))
        assert [path.name for path in out.iterdir()] == ["x.tar"]

    def test_shards_of_one_name(self, module: LoraDiffusion, shards: Path, tmp_path: Path) -> None:
        write_shard(tmp_path / "val" / "shard-000000.tar", range(2))
        data = data_for(shards, val_shards=str(tmp_path / "val"))
        assert "have the same name" in failure(module, data, out=str(tmp_path / "out"))

    def test_a_cache_of_a_cache(self, module: LoraDiffusion, shards: Path) -> None:
        cache_shards(module, data_for(shards))
        assert "is a cache already" in failure(module, data_for(shards / "cache"))

    def test_shards_that_have_changed(self, module: LoraDiffusion, shards: Path) -> None:
        cache_shards(module, data_for(shards))
        write_shard(shards / "shard-000001.tar", range(4, 9))
        message = failure(module, data_for(shards))
        assert "was made from other samples than" in message
        assert "1 are missing and 1 are not in that shard" in message


class TestCommand:
    """``lit-lora cache``."""

    @pytest.fixture
    def config(self, tmp_path: Path, shards: Path, sd_folder: Path) -> Path:
        values: dict[str, Any] = {
            "trainer": {"devices": 64, "strategy": "no such strategy", "max_steps": 3},
            "ckpt_path": "last",
            "model": {
                "family": {
                    "class_path": "StableDiffusion",
                    "init_args": {"pretrained_model_name_or_path": str(sd_folder)},
                },
                "adapter": {"class_path": "LoraConfig"},
            },
            "data": {
                "class_path": "WebDatasetDataModule",
                "init_args": {"train_shards": str(shards), "resolution": 16, "num_workers": 0},
            },
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def test_it_prints_what_to_do_next(self, config: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
        override = ["--data.init_args.decoder.center_crop", "true"]
        command = ["cache", "--config", str(config), "--text=false", "--batch_size", "4", *override]
        command += ["--data.init_args.train_shards", str(shards)]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "shards   3 (0 of them from an earlier run)" in printed
        assert "samples  15" in printed
        assert "left out 0" in printed
        following = f"--config {config} {' '.join(override)} --data.init_args.train_shards {shards / 'cache'}"
        assert printed.splitlines()[-2:] == ["Next:", f"lit-lora fit {following}"]
        assert CacheDescription.read(shards / "cache").dtype == "bfloat16"
        assert main(command) == 0
        assert "shards   3 (3 of them from an earlier run)" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--txet", "false"], "txet"),
            (["--text", "maybe"], "text"),
            (["--dtype", "float8"], "dtype"),
            (["--data.init_args.resolutoin", "3"], "resolutoin"),
            ([], "set --data.init_args.decoder.center_crop true"),
        ],
    )
    def test_mistakes(
        self, arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            status = main(["cache", "--config", str(config), *arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        error = capsys.readouterr().err
        assert status == 2
        assert message in error
        assert "Traceback" not in error

    @pytest.mark.slow
    def test_killed_and_in_two_processes(
        self, config: Path, shards: Path, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The parent is killed while its processes write; they end too, and the next run has what one process has."""
        write_shard(shards / "shard-000003.tar", range(15, 20))
        command = ["-m", "lit_lora.cli", "cache", "--config", str(config), "--jobs", "2"]
        command += ["--data.init_args.decoder.center_crop", "true", "--batch_size", "4", "--out"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        out = tmp_path / "out"
        process = WarmPython([*command, str(out)], environment)
        while not tars(out) and process.poll() is None:
            time.sleep(0.05)
        children = children_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 120
        while any(is_running(child) for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(is_running(child) for child in children)
        module = module_for(StableDiffusion, sd_folder, base_dtype="bfloat16")
        with monkeypatch.context() as patch:  # the first run has shown that they can be spawned
            patch.setattr(cache_work, "multiprocessing", SimpleNamespace(get_context=lambda _: warm_context()))
            summary = cache_shards(module, data_for(shards), str(out), jobs=2, batch_size=4)
        assert summary.samples == 20
        assert not list(out.glob("*.part"))
        cache_shards(module, data_for(shards), str(tmp_path / "alone"), batch_size=4)
        assert tars(out) == tars(tmp_path / "alone")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_editing_pairs(flux_kontext_folder: Path, tmp_path: Path) -> None:
    """A run from a cache of pairs has the losses of one without it, also of flipped pairs; a run without pairs is refused."""
    with tarfile.open(_folder(tmp_path / "shards") / "shard.tar", "w") as archive:
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)
            for name, image in zip(("png", "source.png"), pixels, strict=True):
                Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
                add_member(archive, f"{number}.{name}", buffer.getvalue())
            add_member(archive, f"{number}.txt", b"invert it")
    options: dict[str, Any] = {"batch_size": 1, "resolution": 16, "num_workers": 0, "seed": 4}
    decoder = EditDecoder(center_crop=True, random_flip=True)
    module = module_for(FluxKontext, flux_kontext_folder)
    source = WebDatasetDataModule(str(tmp_path / "shards"), decoder=decoder, **options)
    cache_shards(module, source, batch_size=1, dtype="float32")
    cached = WebDatasetDataModule(str(tmp_path / "shards" / "cache"), decoder=decoder, **options)
    module.configure_model()
    losses = []
    for data in (source, cached):
        data.setup("fit")
        draws = [(batch, Draws(0, batch["slot"])) for batch in data.train_dataloader()]
        losses.append([module.losses(*one)[0].item() for one in draws])
        assert {decoder.with_seed(4).framing.flips(batch["slot"][0]) for batch, _ in draws} == {True, False}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    plain = WebDatasetDataModule(str(tmp_path / "shards" / "cache"), decoder=ImageDecoder(center_crop=True), **options)
    with pytest.raises(UserError, match=r"latents.pairs: true in the cache, false here"):
        plain.setup("fit")


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
