"""What a finished run leaves, and the record of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from lit_lora.files import atomic_file
from lit_lora.tools.run_page import PAGE

_RECORD = "finished.json"


def newest_run(out: Path) -> Path | None:
    """The folder of the newest run with a checkpoint; None if there is none."""
    newest = newest_checkpoint(out)
    return newest and newest.parent.parent


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint; None if there is none.

    Of the folders that loggers number, the highest counts, and otherwise the latest checkpoint: a clock may have been set back.
    """
    checkpoints = list(out.glob("**/checkpoints/*.ckpt"))
    return max(checkpoints, key=lambda path: (_number(path.parent.parent.name), path.stat().st_mtime_ns), default=None)


def best_adapter(run: Path) -> Path | None:
    """The adapter with the lowest validation loss of a run, which is that of the highest step; None if it kept none."""
    found = run.glob("checkpoints/best-*.adapter")
    return max(found, key=lambda path: (_number(path.name), path.stat().st_mtime_ns), default=None)


def _number(name: str) -> int:
    """The last number in a name, such as that of a version or a step; -1 if there is none."""
    return int((re.findall(r"\d+", name) or [-1])[-1])


def results_of(out: Path) -> dict[str, str]:
    """Paths of a run's results by what they are: the run's folder, and in it the adapters, the newest images, the report."""
    folder = newest_run(out)
    if folder is None:
        return {}
    best = best_adapter(folder)
    last = folder / "checkpoints" / "last.adapter"
    samples = max(folder.glob("samples/*.png"), default=None)
    found = {"adapter": last, "best": best, "card": (best or last) / "README.md", "samples": samples}
    found |= {"report": folder / PAGE, "figures": folder / "report.json"}
    there = {name: path for name, path in found.items() if path is not None and path.exists()}
    return {"folder": str(folder)} | {name: str(path.relative_to(folder)) for name, path in there.items()}


def record(out: Path, results: Mapping[str, str]) -> None:
    """Record the results of a finished run in its folder."""
    with atomic_file(out / _RECORD) as part:
        part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def recorded(out: Path) -> dict[str, str] | None:
    """The results of the finished run in a folder; None if it has not finished."""
    path = out / _RECORD
    found: dict[str, str] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found
