from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.checkpoint_io import SafeCheckpointIO, read_checkpoint
from lit_lora.errors import UserError
from tests.datamodules.faulty_server import FaultyServer

GOOD = {"state_dict": {"weight": torch.arange(3.0)}, "global_step": 7}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[FaultyServer, str]]:
    folder = tmp_path / "served"
    folder.mkdir()
    with FaultyServer(folder) as server:
        yield server, server.url.replace("http://", "http://user:hunter2@")


def test_local_and_remote_checkpoints_are_read(tmp_path: Path, server: tuple[FaultyServer, str]) -> None:
    served, url = server
    torch.save(GOOD, served.folder / "good.ckpt")
    for path in (served.folder / "good.ckpt", f"{url}/good.ckpt?token=hunter2"):
        checkpoint = SafeCheckpointIO().load_checkpoint(path)
        assert checkpoint["global_step"] == 7
        assert torch.equal(checkpoint["state_dict"]["weight"], torch.arange(3.0))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_is_executed_from_whatever_path(
    save: Callable[[Any, Path], None], tmp_path: Path, server: tuple[FaultyServer, str]
) -> None:
    served, url = server
    target = tmp_path / "executed"
    save({**GOOD, "hyper_parameters": Payload(target)}, served.folder / "evil.ckpt")
    for path in (str(served.folder / "evil.ckpt"), f"{url}/evil.ckpt"):
        for weights_only in (None, False):
            with pytest.raises(UserError) as error:
                SafeCheckpointIO().load_checkpoint(path, weights_only=weights_only)
            assert "evil.ckpt" in str(error.value)
            assert "hunter2" not in str(error.value)
    assert not target.exists()


def test_remote_checkpoints_have_a_size_limit(server: tuple[FaultyServer, str]) -> None:
    served, url = server
    torch.save(GOOD, served.folder / "good.ckpt")
    with pytest.raises(UserError, match=r"good.ckpt is .* the limit is 100 B; download it"):
        SafeCheckpointIO(max_bytes=100).load_checkpoint(f"{url}/good.ckpt")
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:\d+/absent.ckpt"):
        SafeCheckpointIO().load_checkpoint(f"{url}/absent.ckpt")


def write_bad(kind: str, path: Path) -> Path:
    if kind == "truncated":
        torch.save({**GOOD, "more": torch.zeros(5000)}, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "folder":
        path.mkdir()
    elif kind == "adapter":
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        path.write_bytes(b"")
    elif kind == "dangling":
        path.symlink_to("gone.ckpt")
    elif kind != "absent":
        torch.save({"dict": {"a": 1}, "list": [1, 2], "tensor": torch.zeros(2), "none": None}[kind], path)
    return path


def test_a_checkpoint_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "x.ckpt").write_bytes(b"")
    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(UserError, match=r"x.ckpt cannot be read: Permission denied; change the permissions there$"):
        read_checkpoint(str(tmp_path / "x.ckpt"), "cpu")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is damaged or no checkpoint"),
        ("empty", "is damaged or no checkpoint"),
        ("text", "cannot be read safely|is damaged or no checkpoint"),
        ("zip", "is damaged or no checkpoint"),
        ("folder", "is a folder, not a checkpoint; name the .ckpt file"),
        ("adapter", "is an adapter's folder, not a checkpoint"),
        ("safetensors", "holds weights alone"),
        ("dangling", "points to gone.ckpt, which is gone"),
        ("absent", "does not exist; name a .ckpt file"),
        ("dict", "holds a dict with a, not a checkpoint"),
        ("list", "holds list, not a checkpoint"),
        ("tensor", "holds Tensor, not a checkpoint"),
        ("none", "holds NoneType, not a checkpoint"),
    ],
)
@pytest.mark.parametrize("map_location", ["cpu", "meta"])
def test_anything_else_is_one_error(kind: str, message: str, map_location: str, tmp_path: Path) -> None:
    path = write_bad(kind, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(str(path), map_location)
    assert str(path) in str(error.value)
