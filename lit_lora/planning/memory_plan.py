"""The plan of a run: its memory by phase and kind, and the work and time of a step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_lora.byte_sizes import format_bytes
from lit_lora.files import atomic_file
from lit_lora.planning.device import BANDWIDTH_UTILISATION, COMPUTE_UTILISATION
from lit_lora.planning.planned_memory import PlannedMemory
from lit_lora.profiling.kinds import KINDS
from lit_lora.report_text import format_duration, format_table


@dataclass(frozen=True)
class MemoryPlan(PlannedMemory):
    """Planned memory of a run by phase and kind, with the work and time of a step.

    Args:
        device: Name of the device.
        batch_size: Samples in a batch of one process.
        phases: Bytes of each kind at the peak of each phase: ``load``, ``forward``, ``backward``, ``optimizer``,
            ``validation`` and ``sampling``. The forward phase includes the VAE and the text encoders.
        beside: Allowances in bytes for memory that belongs to no tensor, such as the CUDA context, by name.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        adapter_parameters: Number of trained parameters.
        adapter_file_bytes: Size of ``adapter_model.safetensors``, with those of the text encoders if they are trained, without
            the metadata, which take a kilobyte or two.
        flops_per_step: Floating point operations of an optimizer step, including all its batches and the encoders.
        seconds_per_step: Estimated seconds per optimizer step: :meth:`Device.seconds <lit_lora.planning.device.Device.seconds>`.
        processes: Which process is planned and what it holds, in two lines; defaults to nothing, for a single process.
        host_bytes: Bytes of frozen weights that a process keeps in host memory, page-locked, for a GPU; defaults to none.
    """

    height: int
    width: int
    adapter_parameters: int
    adapter_file_bytes: int
    flops_per_step: int
    seconds_per_step: float
    processes: str = ""
    host_bytes: int = 0

    def write(self, path: str | Path, **more: Any) -> None:
        """Write the plan as JSON.

        Args:
            path: File to write.
            more: Further entries of the JSON object.

        Raises:
            UserError: If the file cannot be written.
        """
        with atomic_file(path) as part:
            part.write_text(json.dumps(self.as_json() | more, indent=2) + "\n", encoding="utf-8")

    def describe(self, cache: PlannedMemory | None = None) -> str:
        """The plan as text: a table and a summary.

        Args:
            cache: Plan of ``lit-lora cache`` for the run, which gets rows in the table; defaults to none.
        """
        # The first word of each kind, so that the table fits 80 columns.
        rows = [["MB", *(kind.partition(" ")[0] for kind in KINDS), "total"]]
        encoding = (
            {f"cache {name.replace('text_encoder', 'text')}": kinds for name, kinds in cache.phases.items()}
            if cache
            else {}
        )
        for phase, kinds in (self.phases | encoding).items():
            rows.append([phase, *(_mb(kinds[kind]) for kind in KINDS), _mb(sum(kinds.values()))])
        share = f"{COMPUTE_UTILISATION:.0%} of the arithmetic and {BANDWIDTH_UTILISATION:.0%} of the bandwidth"
        lines = [
            ["run", f"{self.batch_size} x {self.height} x {self.width} px on {self.device}"],
            *(["", words] for words in self.processes.splitlines()),
            ["peak", f"{format_bytes(self.peak)} of tensors, in {self.peak_phase}"],
            ["beside", "allowances for what is not a tensor:"],
            *(["", f"{format_bytes(size)} {name}"] for name, size in self.beside.items()),
            ["needed", format_bytes(self.needed)],
            *([["host", f"{format_bytes(self.host_bytes)} of weights wait in host memory"]] if self.host_bytes else []),
            ["adapter", f"{self.adapter_parameters:,} parameters in a file of {format_bytes(self.adapter_file_bytes)}"],
            ["step", f"{_flop(self.flops_per_step)}, about {format_duration(self.seconds_per_step)}"],
            ["", f"(estimated at {share})"],
        ]
        if cache is not None:
            lines.append(
                ["cache", f"lit-lora cache needs {format_bytes(cache.needed)} with its batch_size {cache.batch_size}"]
            )
        if self.device != "cpu":
            lines.append(["note", "modeled for GPUs; two plans were within 4 % of runs on an H100"])
        return "\n".join([*format_table(rows), "", *(f"{label:<8} {value}" for label, value in lines)])


def _flop(operations: int) -> str:
    return f"{operations / 1e12:.2f} TFLOP" if operations >= 1e11 else f"{operations / 1e9:.2f} GFLOP"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"
