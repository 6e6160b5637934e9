"""Shards that are named twice: refused in training, told where validation has them too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_lora.datamodules import WebDatasetDataModule, WebDatasetStreamDataModule
from lit_lora.datamodules.indexing.same_shards import check_named_once, resolved
from lit_lora.errors import UserError

OPTIONS: dict[str, Any] = {"batch_size": 2, "resolution": 8, "num_workers": 0}


@pytest.mark.parametrize("other", ["shards", "../{folder}/shards", "link", "link/shard-000000.tar"])
def test_a_shard_that_is_named_by_two_paths(
    other: str, make_shards: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(4, 4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("shards")
    named = [str(tmp_path / "shards"), other.format(folder=tmp_path.name)]
    with pytest.raises(UserError, match=r"0.tar is named more than once, also as /.*shard-000000.tar; name each shard"):
        WebDatasetDataModule(named, **OPTIONS).setup("fit")


def test_shards_of_one_name_in_two_folders_and_urls_are_different() -> None:
    locations = ["a/0.tar", "b/0.tar", "https://x/a/0.tar", "https://x/b/../a/0.tar"]
    check_named_once(locations)
    assert resolved(locations[2:]) == locations[2:]


def test_validation_on_what_is_trained_is_told(
    make_shards: Callable[..., list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_shards(4, 4)
    make_shards(2, folder="other")
    (tmp_path / "link").symlink_to("shards")
    training, link, other = (str(tmp_path / name) for name in ("shards", "link", "other"))

    def told(make: Callable[..., Any], stage: str, validation: list[str], **options: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make(training, val_shards=validation, **options, **OPTIONS).setup(stage)
        return caplog.text

    message = f"2 of 3 shards to validate on are trained on too, first {link}/shard-000000.tar: "
    streams = {"batches_per_epoch": 1, "val_batches": 1}
    assert message in told(WebDatasetDataModule, "fit", [link, other])
    assert message in told(WebDatasetStreamDataModule, "fit", [link, other], **streams)
    assert told(WebDatasetDataModule, "fit", [other]) == told(WebDatasetDataModule, "validate", [link]) == ""
    assert told(WebDatasetStreamDataModule, "fit", [other], **streams) == ""
