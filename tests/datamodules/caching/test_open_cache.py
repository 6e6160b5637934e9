from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from lit_lora.datamodules.caching.latent_cache import CacheDescription
from lit_lora.datamodules.caching.open_cache import open_cache
from lit_lora.datamodules.caching.sources import SourceRecord
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.errors import UserError

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
EMPTY = {"hidden": torch.arange(6.0).view(3, 2)}


@pytest.fixture
def make_cache(tmp_path, write_tar):
    def make(name="cache", description=DESCRIPTION, shards=2):
        for shard in range(shards):
            write_tar(tmp_path / name / f"shard-{shard}.tar", {f"{shard}.safetensors": b"x", f"{shard}.txt": b"x"})
        if description:
            description.write(tmp_path / name)
            save_file(EMPTY, tmp_path / name / "empty.safetensors")
        return tmp_path / name

    return make


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://user:secret@127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cache(make_cache):
    folder = make_cache()
    cache = open_cache(open_table(str(folder)))
    assert cache.folder == str(folder)
    assert cache.description == DESCRIPTION
    torch.testing.assert_close(cache.empty, EMPTY)


def test_a_cache_of_latents_alone(make_cache):
    folder = make_cache(description=replace(DESCRIPTION, encoders=None, captions=None))
    (folder / "empty.safetensors").unlink()
    assert open_cache(open_table(str(folder))).empty == {}


def test_shards_of_images_belong_to_none(make_shards):
    assert open_cache(open_table([str(path) for path in make_shards(2, 1)])) is None


def test_a_remote_cache(make_cache, serve, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = make_cache()
    open_table(str(folder))
    cache = open_cache(open_table(f"{serve}/cache?signature=abc"))
    assert cache.description == DESCRIPTION
    torch.testing.assert_close(cache.empty, EMPTY)
    assert "secret" not in cache.folder
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match=r"cache.json") as caught:
        open_cache(open_table(f"{serve}/cache?signature=abc"))
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_unfinished_or_damaged(make_cache):
    with pytest.raises(
        UserError, match=r"cache.json: No such file or directory; .* unfinished cache: run `lit-lora cache`"
    ):
        open_cache(open_table(str(make_cache("a", None))))
    folder = make_cache("b")
    (folder / "empty.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"empty.safetensors cannot be read .*; remove the cache and make it anew"):
        open_cache(open_table(str(folder)))
    (folder / "empty.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*empty.safetensors: No such file"):
        open_cache(open_table(str(folder)))


def test_several_caches(make_cache):
    one, same = make_cache("one"), make_cache("same")
    assert open_cache(open_table([str(one), str(same)])).folder == str(one)
    other = make_cache("other", replace(DESCRIPTION, resolution=32))
    with pytest.raises(UserError, match=r"latents.resolution: 16 in the cache, 32 here"):
        open_cache(open_table([str(one), str(other)]))


def test_a_shard_in_the_folder_of_another_cache(make_cache):
    folder = make_cache("one")
    record = SourceRecord(None, 1, None, None, "index", DESCRIPTION.checksum())
    record.write(folder / "shard-0.tar")
    replace(record, cache=None).write(folder / "shard-1.tar")  # of an earlier version
    assert open_cache(open_table(str(folder))).description == DESCRIPTION
    replace(record, cache=replace(DESCRIPTION, vae="other").checksum()).write(folder / "shard-1.tar")
    told = rf"{folder}/shard-1.tar is a shard of another cache than {folder}/cache.json describes.*, or remove it"
    with pytest.raises(UserError, match=told):
        open_cache(open_table(str(folder)))


def test_cache_and_images_do_not_mix(make_cache, make_shards):
    cache, images = make_cache("one"), make_shards(2, folder="images")[0].parent
    for specs in ([cache, images], [images, cache]):
        with pytest.raises(UserError, match=rf"{cache} is a cache and {images} holds images"):
            open_cache(open_table([str(spec) for spec in specs]))
    assert open_cache(open_table(str(images))) is None
