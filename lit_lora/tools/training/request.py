"""What the user of ``lit-lora train`` asks for, and the record of it in the run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_lora.errors import UserError
from lit_lora.files import atomic_file
from lit_lora.tools.training.results import newest_checkpoint, recorded
from lit_lora.visible import visible

RECORD = "train.json"
"""File in the run's folder that tells what the run was asked to do."""

CONFIG = "config.yaml"
"""File in the run's folder with its settings."""

_EARLIER = "config.earlier.yaml"
"""File with the settings of an earlier request with which nothing was trained."""

PACKED = ("shards", "shards-validation")
"""Folders in the run's folder with the packed images."""

_CHOSEN = ("cache", "cache-validation", "prompts")
"""Folders in the run's folder with what follows from its settings."""

_OF_PACKING = ("folder", "captions", "trigger", "max_bad", "sources", "class_images")
"""Entries of the record on which the packed images depend."""


class Request(NamedTuple):
    """The options of ``lit-lora train``, and the values for keys of the config in ``given``."""

    folder: str | list[str]
    base: str | None = None
    trigger: str | None = None
    captions: str = "auto"
    out: str | None = None
    device: str | None = None
    device_memory: str | None = None
    cache: bool = True
    max_bad: float = 0.1
    sources: str | list[str] | None = None
    repeats: float | list[float] | None = None
    class_images: str | None = None
    dry_run: bool = False
    given: Mapping[str, Any] = {}

    @property
    def record(self) -> dict[str, Any]:
        """What makes the run what it is; the same command resumes it."""
        own = self._asdict()
        for name in ("out", "dry_run"):
            del own[name]
        folders: Any = [str(folder.absolute()) for folder in self.folders]
        sources = None if self.sources is None else [str(folder.absolute()) for folder in self.source_folders]
        classes = self.class_folder and str(self.class_folder.absolute())
        folders = folders if isinstance(self.folder, list) else folders[0]
        return own | {"folder": folders, "sources": sources, "class_images": classes, "given": dict(self.given)}

    @property
    def folders(self) -> list[Path]:
        """The folders, of which there is one for one set."""
        names = self.folder if isinstance(self.folder, list) else [self.folder]
        return [Path(name).expanduser() for name in names]

    @property
    def source_folders(self) -> list[Path]:
        """The folders of source images, one for each folder."""
        names = self.sources if isinstance(self.sources, list) else [self.sources] if self.sources else []
        return [Path(name).expanduser() for name in names]

    @property
    def class_folder(self) -> Path | None:
        """The folder of class images; None if there is none."""
        return None if self.class_images is None else Path(self.class_images).expanduser()

    @property
    def has_sets(self) -> bool:
        """Whether the options make sets of the folders, also of a single one."""
        return len(self.folders) > 1 or self.repeats is not None or self.class_images is not None


def claim(out: Path, request: Request) -> None:
    """Check that a folder is empty or holds the run that is asked for, and record the run.

    A run that has trained nothing yet, such as a dry run, gives way to another one.

    Raises:
        UserError: If it holds anything else.
    """
    path = out / RECORD
    if not path.exists():
        others = sorted(one.name for one in out.iterdir() if not one.name.endswith(".lock"))
        if others:
            raise UserError(
                f"{visible(out)} holds {visible(others[0])}, which is no run of train; name another folder with --out"
            )
        _write(path, request)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{visible(path)} is damaged; name another folder with --out") from error
    differing = [name for name, value in request.record.items() if found.get(name) != value]
    if differing and not has_trained(out):
        if set(differing) & set(_OF_PACKING):
            _remove(out, PACKED)
        forget_settings(out)
        _write(path, request)
    elif differing:
        there, here = _difference(differing[0], found.get(differing[0]), request.record[differing[0]])
        raise UserError(
            f"{visible(out)} holds a run with {there}, not {here}; give the same options to resume it, or name another folder "
            f"with --out; lit-lora fit --config {visible(out / CONFIG)} --ckpt_path last trains it further with other settings"
        )


def has_trained(out: Path) -> bool:
    """Whether the run in a folder has saved a checkpoint, or has ended."""
    return newest_checkpoint(out) is not None or recorded(out) is not None


def forget_settings(out: Path) -> None:
    """Have settings chosen anew. The config, which may have been edited, is kept beside, and the user is told."""
    _remove(out, _CHOSEN)
    if (out / CONFIG).exists():
        (out / CONFIG).replace(out / _EARLIER)
        print(f"earlier  settings that nothing was trained with are now in {out / _EARLIER}")


def _remove(out: Path, names: Sequence[str]) -> None:
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def _difference(name: str, there: Any, here: Any) -> tuple[str, str]:
    """Two values of an option that differ, as they are told; of values for keys of the config the first key that differs."""
    if name != "given":
        return f"{name}={there!r}", repr(here)
    there = there if isinstance(there, dict) else {}
    key = next(key for key in (*here, *there) if here.get(key) != there.get(key) or (key in here) != (key in there))
    if key not in there:
        return f"no {key}", repr(here[key])
    return f"{key}={there[key]!r}", repr(here[key]) if key in here else "without it"


def _write(path: Path, request: Request) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(request.record, indent=2) + "\n", encoding="utf-8")
