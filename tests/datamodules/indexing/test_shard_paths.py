from __future__ import annotations

import os

import pytest

from lit_lora.datamodules.indexing.shard_paths import expand_braces, find_shards
from lit_lora.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b-1.tar", "b-0.tar", "c.tar", "other.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ("c.tar", ["c.tar"]),
        ("b-{0..1}.tar", ["b-0.tar", "b-1.tar"]),
        ("b-*.tar", ["b-0.tar", "b-1.tar"]),
        ("{c,b-*}.tar", ["c.tar", "b-0.tar", "b-1.tar"]),
        (".", ["b-0.tar", "b-1.tar", "c.tar"]),
        (["c.tar", "b-0.tar"], ["c.tar", "b-0.tar"]),
    ],
)
def test_forms(folder, specs, names):
    assert [path.name for path in find_shards(specs)] == names


def test_absolute_and_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert find_shards(f"{folder}/b-*.tar") == [folder / "b-0.tar", folder / "b-1.tar"]
    assert find_shards("~/c.tar") == [folder / "c.tar"]


def test_name_with_braces_that_exists(folder):
    (folder / "x{1}[2].tar").touch()
    assert [path.name for path in find_shards("x{1}[2].tar")] == ["x{1}[2].tar"]


@pytest.mark.parametrize("spec", ["https://example.com/c.tar", "s3://bucket/c.tar"])
def test_remote_shards_are_refused(folder, spec):
    with pytest.raises(UserError, match="is not a local file; name local shards"):
        find_shards(spec)


def test_missing(folder):
    with pytest.raises(UserError, match=r"3 of 5 shards are missing, first b-2.tar, b-3.tar, b-4.tar"):
        find_shards("b-{0..4}.tar")
    with pytest.raises(UserError, match=r"none-\*.tar matches no shards"):
        find_shards(["c.tar", "none-*.tar"])
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty matches no shards"):
        find_shards("empty")
    (folder / "above" / "a").mkdir(parents=True)
    (folder / "above" / "a" / "c.tar").touch()
    with pytest.raises(UserError, match=r"name \*.tar files or a folder in it that contains some, such as above/a"):
        find_shards("above")


def test_unbalanced_braces(folder):
    with pytest.raises(UserError, match="unbalanced braces"):
        find_shards("{b-{0..1}.tar")


def test_long_list_in_braces(folder):
    names = ",".join(["b-0", "c"] * 100)
    assert len(find_shards(f"{folder}/{{{names}}}.tar")) == 200


def test_paths_are_taken_too(folder):
    assert find_shards([folder / "c.tar"]) == find_shards(folder / "c.tar") == [folder / "c.tar"]


def test_shell_commands_are_refused():
    with pytest.raises(UserError, match="pipe: runs shell commands and is refused; only"):
        find_shards("pipe:cat c.tar")


def test_a_folder_names_what_it_leaves_out(tmp_path):
    for name in ("a.tar", "B.TAR", "._a.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(str(tmp_path))] == ["B.TAR", "a.tar"]
    (tmp_path / "c.tar.gz").touch()
    with pytest.warns(UserWarning, match="1 compressed tars there cannot be indexed and are left out, first c.tar.gz"):
        assert len(find_shards(str(tmp_path))) == 2


def test_a_folder_names_the_folders_that_it_leaves_out(tmp_path):
    for name in ("a.tar", "more/b.tar", "cache/a.tar", "cache/cache.json", "unfinished/a.tar", "images/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "unfinished" / "cache.unfinished.json").touch()
    with pytest.warns(UserWarning, match="shards in its folders are not read, such as those in more; name these"):
        assert [path.name for path in find_shards(str(tmp_path))] == ["a.tar"]
    assert len(find_shards(str(tmp_path / "**" / "*.tar"))) == 4


@pytest.mark.filterwarnings("ignore:.*compressed tars")
def test_a_folder_of_compressed_shards(tmp_path):
    (tmp_path / "c.tgz").touch()
    with pytest.raises(
        UserError, match=r"matches no shards.*first c.tgz: decompress them .*WebDatasetStreamDataModule"
    ):
        find_shards(str(tmp_path))


@pytest.mark.parametrize(
    "spec", ["x-{0..1000000000000}.tar", "x-{0..999}{0..999}{0..9}.tar", f"x-{{0..{'9' * 5000}}}.tar"]
)
def test_braces_without_bound(spec):
    with pytest.raises(UserError, match="names more than 1000000 shards; name fewer"):
        expand_braces(spec)


@pytest.mark.parametrize("spec", ["x.tar", "."])
def test_pipe_that_is_called_a_shard(folder, spec):
    os.mkfifo("x.tar")
    with pytest.raises(UserError, match=r"x\.tar is a pipe, not a regular file"):
        find_shards(spec)
