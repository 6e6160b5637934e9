from __future__ import annotations

import pytest

from lit_lora.datamodules.packing.walk import OtherSplits, walk_files
from lit_lora.errors import UserError


def _walk(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    others = OtherSplits()
    return [file for file, _ in walk_files(folder, others=others)], others


def test_hidden_files_of_operating_systems_are_passed_over(tmp_path):
    hidden = [
        "__MACOSX/._a.jpg",
        "._a.jpg",
        ".DS_Store",
        "d/Thumbs.db",
        "d/desktop.ini",
        "@eaDir/a.jpg",
        ".Trashes/a.jpg",
    ]
    found, _ = _walk(tmp_path, "a.jpg", ".b.jpg", "d/c.jpg", *hidden)
    assert found == [".b.jpg", "a.jpg", "d/c.jpg"]


@pytest.mark.parametrize("other", ["validation", "val", "valid", "dev", "test", "Test", "testing", "eval"])
def test_train_alone_is_walked(tmp_path, other):
    found, others = _walk(
        tmp_path, "train/a.jpg", f"{other}/a.jpg", f"{other}/sub/b.bmp", f"{other}/a.txt", "more/c.jpg"
    )
    assert found == ["more/c.jpg", "train/a.jpg"]
    assert (others.folders, others.files) == ({other: 2}, [])
    assert others.contain(f"{other}/sub/b.bmp")
    assert not others.contain(f"{other}s/b.bmp")


def test_splits_at_any_depth_and_by_names_of_tables(tmp_path):
    names = [
        "cats/train/a.jpg",
        "cats/val/a.jpg",
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    found, others = _walk(tmp_path, *names, "data/testimony.parquet", "data/dev.csv", "data/test_1.jpg")
    assert found == [
        "cats/train/a.jpg",
        "data/test_1.jpg",
        "data/testimony.parquet",
        "data/train-00000-of-00001.parquet",
    ]
    assert (others.folders, others.files) == ({"cats/val": 1}, ["data/dev.csv", "data/test-00000-of-00001.parquet"])


@pytest.mark.parametrize(
    "names",
    [
        ["test/a.jpg", "b.jpg"],  # there is only one such folder
        ["train/a.jpg", "training/b.jpg"],
        ["train/a.jpg", "test/test_walk.py", "val/README"],  # no samples in there
        ["train/a.jpg", "tests/a.jpg", "validations/a.jpg"],
    ],
)
def test_names_that_are_no_splits(tmp_path, names):
    found, others = _walk(tmp_path, *names)
    assert sorted(found) == sorted(names) or not any("." in name for name in set(names) - set(found))
    assert (others.folders, others.files) == ({}, [])


def test_splits_without_train_are_not_mixed(tmp_path):
    with pytest.raises(
        UserError, match=r"contains several splits, but none named train; pack one of them, or rename: .*/test"
    ):
        _walk(tmp_path, "validation/a.jpg", "test/a.jpg")


def test_links_in_circles(tmp_path):
    """To the folder itself, to one above and to themselves: those to themselves are files that cannot be read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.jpg").touch()
    for name, target in (("up", ".."), ("here", "."), ("itself", "itself"), ("itself.jpg", "itself.jpg")):
        (tmp_path / "data" / name).symlink_to(target)
    found, _ = _walk(tmp_path / "data", "a.jpg", "d/b.jpg")
    assert found == ["a.jpg", "d/b.jpg", "itself", "itself.jpg"]
    assert list(walk_files(tmp_path / "data", tmp_path / "data" / "itself"))
