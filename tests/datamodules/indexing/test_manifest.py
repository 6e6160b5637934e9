from __future__ import annotations

import json
import warnings

import pytest

from lit_lora.datamodules.indexing.manifest import MANIFEST, missing_shards, write_manifest
from lit_lora.datamodules.indexing.shard_paths import find_shards

ROWS = [("a.tar", 3, 100), ("b.tar", 2, 50), ("c.tar", 1, 20)]


@pytest.fixture
def folder(tmp_path):
    for name, _, _ in ROWS:
        (tmp_path / name).write_bytes(b"")
    write_manifest(tmp_path, ROWS)
    return tmp_path


def test_totals(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["samples"], manifest["bytes"]) == (6, 170)
    assert manifest["shards"][1] == {"name": "b.tar", "samples": 2, "bytes": 50}


def test_a_shard_that_was_lost_is_told(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_shards(str(folder))) == 3
    (folder / "b.tar").unlink()
    with pytest.warns(
        UserWarning, match=r"lacks 1 of the shards that its manifest.json lists, first b.tar, whose samples"
    ):
        assert len(find_shards(str(folder))) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_shards(str(folder / "*.tar"))  # names what is wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "other", "version": 1, "shards": []}',
        '{"format": "lit_lora.shards", "version": 1}',
        "\udcff",
    ],
)
def test_a_manifest_of_something_else_says_nothing(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert missing_shards(folder, [MANIFEST]) == []
