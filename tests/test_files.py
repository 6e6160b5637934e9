import errno
import os
import socket
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from lit_lora import files
from lit_lora.errors import UserError
from lit_lora.files import (
    atomic_file,
    atomic_folder,
    check_place,
    check_readable,
    check_regular,
    remove_unfinished,
    restore_replaced,
    writable_folder,
)
from lit_lora.machine import process_space


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as part:
        part.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), atomic_file(path) as part:
        part.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_as_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for text in ("one", "two"):
        with atomic_folder(path, marker="one") as part:
            (part / text).write_text(text)
    assert [p.name for p in path.iterdir()] == ["two"]
    with pytest.raises(RuntimeError), atomic_folder(path, marker="two") as part:
        (part / "three").write_text("x")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_unfinished_files_of_running_processes_and_of_other_machines_are_kept(tmp_path: Path) -> None:
    killed = f"{process_space()}-{2**22 + 1}-01234567.part"  # above the largest id
    kept = ["a.index", f"b.txt.{killed}", f"a.index.01234567-{2**22 + 1}-01234567.part", "a.index.part"]
    for name in (*kept, f"a.index.{killed}"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "b.index") as part:
        part.touch()
        remove_unfinished(tmp_path, "*.index")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "b.index"])
    remove_unfinished(tmp_path / "missing", "*")


def test_unfinished_files_of_other_machines_are_removed_after_a_day(tmp_path: Path) -> None:
    own = f"a.index.{process_space()}-{os.getpid()}-01234567.part"
    old, new = f"a.index.01234567-{os.getpid()}-01234567.part", "a.index.01234567-5-01234567.part"
    for name, hours in ((own, 30), (old, 25), (new, 23)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    remove_unfinished(tmp_path, "*.index")
    assert {path.name for path in tmp_path.iterdir()} == {own, new}


@pytest.mark.parametrize("new", [True, False])
def test_a_folder_whose_replacement_was_killed(tmp_path: Path, new: bool) -> None:
    (tmp_path / "x.adapter.12.old").mkdir()
    (tmp_path / "x.adapter.12.old" / "old").touch()
    if new:
        (tmp_path / "x.adapter").mkdir()
    restore_replaced(tmp_path, "*.adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["x.adapter"]
    assert (tmp_path / "x.adapter" / "old").exists() is not new


def test_a_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create the folder .*file/below.*name another folder"):
        writable_folder(tmp_path / "file" / "below")


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UserError, match=r"link is a symbolic link to gone, where no folder is; name another folder"):
        writable_folder(tmp_path / "link")
    with pytest.raises(UserError, match=r"file is a file, not a folder; name another folder"):
        writable_folder(tmp_path / "file")


def test_a_folder_that_takes_no_files_is_refused_before_the_work(tmp_path: Path) -> None:
    """Root may write to /proc by its permissions."""
    with (
        pytest.raises(UserError, match=r"the folder /proc is not writable; name another folder"),
        atomic_file("/proc/x"),
    ):
        raise AssertionError("not reached")
    assert writable_folder(tmp_path) == tmp_path
    assert [*tmp_path.iterdir()] == []


def test_the_place_of_the_root_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(files, "writable_folder", asked.append)
    check_place("/")
    check_place("/nowhere/below/file")
    assert asked == [Path("/"), Path("/")]


def test_a_full_disk_is_told_by_the_write_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert writable_folder(tmp_path) == tmp_path


def test_a_folder_of_somebody_elses_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "precious").write_text("")
    with pytest.raises(UserError, match="holds other files"), atomic_folder(path, marker="ours"):
        raise AssertionError("not reached")
    assert [p.name for p in path.iterdir()] == ["precious"]


def test_others_may_read_what_safetensors_writes(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "a") as part:
            part.write_text("x")
            part.chmod(0o600)
        with atomic_folder(tmp_path / "folder", marker="b") as folder:
            (folder / "b").write_text("x")
            (folder / "b").chmod(0o600)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "folder/b")] == [0o644, 0o644]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    check_readable(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read all
    with pytest.raises(PermissionError, match=r"Permission denied: .*file"):
        check_readable(tmp_path / "file")


def test_only_regular_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_regular(tmp_path / "file").st_size == 0
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "socket"))
    for name, kind in (("pipe", "pipe"), ("link", "device"), ("socket", "socket"), (".", "folder")):
        with pytest.raises(UserError, match=f"is a {kind}, not a regular file"):
            check_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "absent")
