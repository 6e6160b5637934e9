"""The report of a memory profile, as plain data and as text for the console."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch

import lit_lora
from lit_lora.profiling.meter import MemoryMeter
from lit_lora.profiling.record import MIB, MemoryRecord


def profile_report(
    record: MemoryRecord,
    meter: MemoryMeter,
    *,
    status: str,
    stage: str,
    baseline: int,
    options: Mapping[str, int],
    ranks: list[int] | None,
    out_of_memory: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The contents of ``memory.json``, which :class:`~lit_lora.callbacks.MemoryProfiler` describes.

    Args:
        record: Peaks of all phases.
        meter: Meter that measured them.
        status: How the run ended: finished, interrupted, failed or out of memory.
        stage: Stage of the trainer, such as fit.
        baseline: Bytes in use before the model was loaded.
        options: Options of the profiler.
        ranks: Highest peak of each process in bytes; None if it is unknown.
        out_of_memory: Details of an out-of-memory error; None if there was none.
    """
    highest = record.highest
    return {
        "schema": 1,
        "status": status,
        "stage": stage,
        "device": str(meter.device),
        "device_name": meter.device_name,
        "note": meter.note,
        "versions": {
            "lit_lora": lit_lora.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "options": dict(options),
        "baseline": baseline,
        "peak": highest and {"phase": highest[0], "step": highest[1].step, "bytes": highest[1].height},
        "ranks": ranks,
        "phases": {name: asdict(memory) for name, memory in record.phases.items()},
        "out_of_memory": out_of_memory,
    }


def profile_title(meter: MemoryMeter) -> str:
    """Title of the table and the chart, with the measure and the device."""
    measure = next(iter(meter.current()))
    return f"Peak memory by phase and kind ({measure}, {meter.device})"


def profile_text(report: Mapping[str, Any], table: str, title: str, files: Sequence[Path]) -> str:
    """The report as text.

    Args:
        report: See :func:`profile_report`.
        table: Table of the phases.
        title: Title of the table.
        files: Files that were written.
    """
    lines = [f"\n{title}, MiB", table]
    if report["peak"]:
        lines.append("highest peak: {bytes:,} bytes in {phase} at step {step}".format(**report["peak"]))
    if report["baseline"] > 0:
        lines.append(f'"other" includes {report["baseline"] / MIB:,.1f} MiB in use before the model was loaded')
    if report["ranks"] and len(report["ranks"]) > 1:
        peaks = ", ".join(f"{peak / MIB:,.1f}" for peak in report["ranks"])
        lines.append(f"highest peak of each process: {peaks} MiB")
    if report["note"]:
        lines.append(f"note: {report['note']}")
    if report["out_of_memory"]:
        lines += _out_of_memory_lines(report["out_of_memory"])
    return "\n".join([*lines, f"written: {', '.join(map(str, files))}"])


def _out_of_memory_lines(error: Mapping[str, Any]) -> list[str]:
    lines = [f"\nOut of memory in {error['phase']}: {error['message'].splitlines()[0]}", "in use at that time, MiB:"]
    lines += [f"  {kind:16}{size / MIB:12,.1f}" for kind, size in error["kinds"].items()]
    if error["advice"]:
        lines.append("changes, with the MiB that each saves by itself, approximately:")
        lines += [f"{saved / MIB:12,.1f}  {change}" for change, saved in error["advice"]]
    return lines
