"""The versions of a run that was resumed: loggers number a folder for each start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import yaml

from lit_lora.tools.run_page.scalars import Curves

_VERSION = "version_"


def number_of(folder: Path) -> int:
    """The number of a version's folder; -1 for other folders."""
    number = folder.name.removeprefix(_VERSION)
    return int(number) if folder.name.startswith(_VERSION) and number.isdigit() else -1


def resumed_from(folder: Path) -> str | None:
    """What a version's config says that it was resumed from: a checkpoint or ``last``; None for a beginning."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    value = config.get("ckpt_path") if isinstance(config, dict) else None
    return None if value is None else str(value)


def earlier_versions(folder: Path) -> list[Path]:
    """The versions beside a version that it was resumed from, one after the other, the first one first.

    ``last`` is the newest checkpoint of the versions before, and so in the last one that has any.
    """
    found: list[Path] = []
    while (resumed := resumed_from(folder)) is not None:
        before = [one for one in folder.parent.glob(f"{_VERSION}*") if -1 < number_of(one) < number_of(folder)]
        if resumed == "last":
            before = [one for one in before if any(one.glob("checkpoints/*.ckpt"))]
        else:  # the path is one of where the run was started
            before = [one for one in before if Path(resumed).parts[-3:-1] == (one.name, "checkpoints")]
        if not before:
            break
        folder = max(before, key=number_of)
        found.insert(0, folder)
    return found


def join(curves: Sequence[Curves]) -> Curves:
    """The curves of versions that go on from one another: of each step, what the last one to take it has logged.

    Args:
        curves: Curves of each version, the first one first.
    """
    joined: Curves = {}
    for later in curves:
        first = first_step(later)
        before = {name: [point for point in points if point[0] < first] for name, points in joined.items()}
        names = dict.fromkeys([*before, *later])
        joined = {name: before.get(name, []) + later.get(name, []) for name in names}
    return {name: points for name, points in joined.items() if points}


def best_of(adapters: Sequence[Path], losses: Sequence[tuple[int, float]]) -> Path:
    """The best of the versions' best adapters: a version looks for its best checkpoint anew.

    Args:
        adapters: At least one, with the steps in their names, the first version's first.
        losses: Validation losses by step; without one at or before an adapter's step, the last adapter counts.
    """
    found: list[tuple[float, Path]] = []
    for adapter in reversed(adapters):
        step = int((re.findall(r"\d+", adapter.name) or [-1])[-1])
        measured = [loss for at, loss in losses if at <= step]
        found.append((measured[-1] if measured else float("inf"), adapter))
    return min(found, key=itemgetter(0))[1]


def first_step(curves: Curves) -> float:
    """The first step of all curves; infinity if there are none."""
    return min((points[0][0] for points in curves.values()), default=float("inf"))
