"""What a finished run leaves, and the record of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_lora.files import atomic_file
from lit_lora.run_folder import run_folder

_RECORD = "finished.json"


def results_of(trainer: Any) -> dict[str, str]:
    """Paths of a run's results by what they are: the adapters' folders, the newest images, the report."""
    checkpoint, folder = trainer.checkpoint_callback, Path(run_folder(trainer))
    last, best = (
        Path(path).with_suffix(".adapter") for path in (checkpoint.last_model_path, checkpoint.best_model_path)
    )
    found = {"adapter": last}
    if checkpoint.monitor is not None:
        found["best"] = best
    found["card"] = (best if "best" in found else last) / "README.md"
    found |= {"samples": max(folder.glob("samples/*.png"), default=Path()), "report": folder / "report.json"}
    return {name: str(path) for name, path in found.items() if path.exists() and path != Path()}


def record(out: Path, results: Mapping[str, str]) -> None:
    """Record the results of a finished run in its folder."""
    with atomic_file(out / _RECORD) as part:
        part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def recorded(out: Path) -> dict[str, str] | None:
    """The results of the finished run in a folder; None if it has not finished."""
    path = out / _RECORD
    found: dict[str, str] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found
