"""Finds a run and writes its page."""

from __future__ import annotations

import re
from pathlib import Path

from lit_lora.errors import UserError
from lit_lora.files import atomic_file
from lit_lora.tools.run_page import PAGE
from lit_lora.tools.run_page.facts import read_run
from lit_lora.tools.run_page.page import page_of
from lit_lora.tools.run_page.versions import number_of

_TRACES = (
    "events.out.tfevents.*",
    "metrics.csv",
    "report.json",
    "memory.json",
    "samples/step-*.png",
    "checkpoints/*.ckpt",
)
"""What shows that a folder is that of a run."""

_WITHOUT_TRAINING = re.compile(r"^(verbose|return_predictions):", re.MULTILINE)


def write_page(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: Folder of the run, or of all its versions.
        out: File to write, or a folder for ``report.html``; defaults to the folder of the version.

    Returns:
        The file.

    Raises:
        UserError: If there is no run, the file's name does not end in .html, or it cannot be written.
    """
    if out is not None and not out.is_dir() and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"out={str(out)!r} is neither a folder nor has it the ending .html; name a file such as report.html, or a folder "
            "that exists"
        )
    folder = run_of(run)
    target = folder / PAGE if out is None else out / PAGE if out.is_dir() else out
    page = page_of(read_run(folder))
    with atomic_file(target) as part:
        part.write_text(page, encoding="utf-8")
    return target


def run_of(path: Path) -> Path:
    """The folder of a run: the path itself, or the newest version in it.

    Raises:
        UserError: If there is none.
    """
    if not path.is_dir():
        raise UserError(f"run={str(path)!r} is no folder; name the folder of a run, such as runs/NAME")
    if (path / "adapter_config.json").exists():
        raise UserError(f"run={str(path)!r} is an adapter; name the folder of its run, such as {path.parent.parent}")
    if _is_run(path):
        return path
    versions = [
        one for pattern in ("version_*", "lightning_logs/version_*") for one in path.glob(pattern) if _is_run(one)
    ]
    if not versions:
        raise UserError(
            f"run={str(path)!r} is no run's folder: it has no logs, samples, checkpoints or report.json, nor has a version "
            f"in it; name the folder of lit-lora train, or a version of fit such as runs/NAME/lightning_logs/version_0"
        )
    return max(versions, key=lambda one: (_trains(one), number_of(one)))


def _trains(folder: Path) -> bool:
    """Whether a version is not of validate, test or predict, which log too: their configs have options that those of fit lack."""
    config = folder / "config.yaml"
    return not config.is_file() or not _WITHOUT_TRAINING.search(config.read_text(encoding="utf-8", errors="replace"))


def _is_run(folder: Path) -> bool:
    return any(True for pattern in _TRACES for _ in folder.glob(pattern))
