"""Tiny shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = Mapping[str, bytes]


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    """Encode a picture of noise: ``encode_image(width, height, format, **options for Pillow)``."""

    def encode(width: int = 24, height: int = 16, format: str = "JPEG", seed: int = 0, **options: object) -> bytes:  # noqa: A002
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_tar() -> Callable[[Path, Members], Path]:
    """Write members to a tar in the given order."""

    def write(path: Path, members: Members) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def make_shards(
    tmp_path: Path, encode_image: Callable[..., bytes], write_tar: Callable[[Path, Members], Path]
) -> Callable[..., list[Path]]:
    """Shards of samples ``0000``, ``0001``, …, each with an image of its own and the caption ``caption 0000``."""

    def make(*counts: int, folder: str = "shards") -> list[Path]:
        paths = []
        number = 0
        for shard, count in enumerate(counts):
            members: dict[str, bytes] = {}
            for _ in range(count):
                members[f"{number:04}.jpg"] = encode_image(seed=number)
                members[f"{number:04}.txt"] = f"caption {number:04}\n".encode()
                number += 1
            paths.append(write_tar(tmp_path / folder / f"shard-{shard:06}.tar", members))
        return paths

    return make
