"""Scalars that loggers wrote: TensorBoard's event files and Lightning's CSV files."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Curves = dict[str, list[tuple[int, float]]]
"""Steps and values by the name of the scalar."""


def read_curves(folder: Path, notes: list[str]) -> Curves:
    """All scalars in a run's folder, by the number of optimizer steps after which they were measured.

    Lightning logs the values of the tenth step at 9; what it validates before the first step stays at 0.

    Args:
        folder: Folder of the run.
        notes: Takes what could not be read, and how many values are not finite.
    """
    curves = _from_csv(folder / "metrics.csv", notes)
    if any(folder.glob("events.out.tfevents.*")):
        curves |= _from_tensorboard(folder, notes)
    for name, points in curves.items():
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if len(finite) < len(points):
            notes.append(f"{len(points) - len(finite)} of {len(points)} values of {name} are NaN or Inf")
        curves[name] = sorted((step + (step > 0 or not name.startswith("val/")), value) for step, value in finite)
    return {name: points for name, points in curves.items() if points}


def _from_tensorboard(folder: Path, notes: list[str]) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Images and all else are left on the disk; 0 keeps all scalars.
    sizes = {"images": 1, "histograms": 1, "tensors": 1, "scalars": 0}
    with _noting_damage(notes):
        events = EventAccumulator(str(folder), size_guidance=sizes).Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


class _Damage(logging.Handler):
    """Takes the event files that TensorBoard reads up to a damaged record, which it says in its log for debugging alone."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.files: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # A record that is cut off is the last of a run that goes on.
        if "crc32 check" in record.getMessage() and isinstance(record.args, tuple):
            self.files.append(Path(str(record.args[0])).name)


@contextmanager
def _noting_damage(notes: list[str]) -> Iterator[None]:
    logger, damage = logging.getLogger("tensorboard"), _Damage()
    level = logger.level
    logger.addHandler(damage)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(damage)
    notes += [f"{name} is damaged, and what follows the damage is not shown" for name in damage.files]


def _from_csv(path: Path, notes: list[str]) -> Curves:
    curves: Curves = {}
    if not path.is_file():
        return curves
    try:
        with path.open(newline="", encoding="utf-8") as file:
            # The last line of a run that goes on may be written in part, with a number cut off.
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                step = int(float(row["step"]))
                for name, text in row.items():
                    if name != "step" and text:
                        curves.setdefault(name, []).append((step, float(text)))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        notes.append(f"{path.name} cannot be read to its end: {error!r}")
    return curves
