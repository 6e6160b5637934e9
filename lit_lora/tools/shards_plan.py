"""``lit-lora shards plan``: a summary of the data of a run before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.batches.plan import Plan
from lit_lora.datamodules.batches.plan_report import (
    bucket_rows,
    chunk_rows,
    measure_reading,
)
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.datamodules.staging.make_stager import checked_budget
from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
from lit_lora.errors import UserError, check_above, check_least
from lit_lora.lightning_cli import ToolCLI, build_cli
from lit_lora.loops import passes_in
from lit_lora.report_text import format_duration, format_reason, format_table


def shards_plan(arguments: list[str]) -> None:
    """Run ``lit-lora shards plan`` with the arguments of ``lit-lora fit`` and those of :func:`describe`."""
    cli = build_cli(["fit", *arguments], run=False, cli_class=_PlanCLI)
    data, options = cli.datamodule, cli.options
    if not isinstance(data, WebDatasetDataModule):
        raise UserError(f"data is a {type(data).__name__}, which does not plan its batches; use a WebDatasetDataModule")
    if options["processes"] is None:
        options["processes"] = processes_of(cli.config["trainer"])
    trainer = cli.config["trainer"]
    print(describe(data, max_steps=trainer["max_steps"], accumulate=trainer["accumulate_grad_batches"], **options))


def describe(
    data: WebDatasetDataModule,
    processes: int | None = None,
    images_per_second: float | None = None,
    max_steps: int = -1,
    accumulate: int = 1,
) -> str:
    """Describe the data of a run: chunks, batches, dropped or padded samples, disk space and time.

    Args:
        data: Datamodule of the run.
        processes: Number of training processes on all machines; defaults to the trainer's devices times nodes.
        images_per_second: Training speed of all processes together, from the progress bar of an earlier run, which gives
            the time of a pass. Defaults to the measured speed of reading and decoding, which gives a lower bound.
        max_steps: Optimizer steps of the run; -1 for no limit.
        accumulate: Batches of each process in a step; defaults to 1.

    Returns:
        The description as text.

    Raises:
        UserError: If the shards are missing or damaged, or the run could not start for another reason.
    """
    check_least(1, processes=processes)
    check_above(0, images_per_second=images_per_second)
    data.prepare_data()
    data.setup("fit")
    processes = processes or 1
    plan, chunks = data.plan(processes), data.train_samples
    table = chunks.table
    shown = plan.samples_per_pass
    sizes = sorted(chunks.chunk_bytes.tolist(), reverse=True)
    lines = [
        ["data", f"{len(table):,} samples in {_shards(len(table.locations))}, {format_bytes(sum(sizes))}"],
        ["excluded", f"{len(chunks.held_out):,} samples held out for validation, {chunks.too_small:,} too small"],
        ["batch", f"{plan.global_batch_size:,} = {data.batch_size} x {_count(processes, 'process', 'processes')}"],
        ["chunks", f"{plan.num_chunks:,}, largest {format_bytes(sizes[0])}"],
        ["pass", f"{plan.batches_per_pass:,} batches, {shown:,} samples"],
        ["dropped" if plan.leftovers == "drop" else "padded", _share(plan)],
    ]
    if max_steps > 0:
        passes = passes_in(max_steps, plan.batches_per_pass, accumulate)
        lines.append(["steps", f"{max_steps:,}, or {passes:.2f} passes"])
    lines.append(["disk peak", _disk(data, sizes)])
    lines.append(["time", _time(data, plan, shown, processes, images_per_second)])
    blocks = [[format_reason(f"{label:<15} {value}", indent=16) for label, value in lines]]
    if plan.num_chunks > 1:
        blocks.append(format_table(chunk_rows(plan, chunks)))
    if len(chunks.sizes) > 1:
        blocks.append(format_table(bucket_rows(plan, chunks)))
    return "\n\n".join("\n".join(block) for block in blocks)


class _PlanCLI(ToolCLI):
    command = "lit-lora shards plan"
    function = staticmethod(describe)
    parts = frozenset({"data", "max_steps", "accumulate"})

    def instantiate_classes(self) -> None:
        parser = ArgumentParser()
        parser.add_subclass_arguments(LightningDataModule, "data")
        self.datamodule = parser.instantiate_classes(parser.parse_object({"data": self.config["data"]})).data


def processes_of(trainer: Any) -> int:
    """Number of training processes on all machines, from the config of the trainer."""
    return devices_of(trainer) * int(trainer["num_nodes"])


def devices_of(trainer: Any) -> int:
    """Number of training processes of one machine, from the config of the trainer."""
    devices = trainer["devices"]
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        devices = [part for part in devices.split(",") if part] if "," in devices else int(devices)
    if devices in ("auto", "-1", -1):
        devices = torch.cuda.device_count() if trainer["accelerator"] != "cpu" else 1
    count = len(devices) if isinstance(devices, list) else int(devices)
    return max(1, count)


def _share(plan: Plan) -> str:
    number = plan.num_samples - plan.samples_per_round if plan.leftovers == "drop" else plan.padding_per_round
    what = "samples that fill no batch" if plan.leftovers == "drop" else "samples of weight 0 that fill up batches"
    return f"{number:,} {what} ({number / plan.num_samples:.2%}) in a pass over each chunk"


def _disk(data: WebDatasetDataModule, sizes: Sequence[int]) -> str:
    staging = data.chunks.staging
    if staging is None:
        return "none: the shards are read in place"
    needed = sum(sizes[:2])
    allowed = checked_budget(staging, data.train_samples)
    free = shutil.disk_usage(staging.dir).free
    return (
        f"{format_bytes(needed)} for two chunks, at most {format_bytes(max(needed, min(allowed, sum(sizes))))} of the"
        f" {format_bytes(allowed)} allowed in {staging.dir} ({format_bytes(free)} free)"
    )


def _time(data: WebDatasetDataModule, plan: Plan, shown: int, processes: int, images_per_second: float | None) -> str:
    if images_per_second is not None:
        return f"{format_duration(shown / images_per_second)} a pass at {images_per_second:g} images/s"
    dataset = data.train_dataset()
    if any(is_remote(location) for location in dataset.reader.table.locations):
        return "unknown; set --images_per_second to the speed in the progress bar of an earlier run"
    with _torch_threads(1):
        rate = measure_reading(dataset, plan)
    readers = max(1, data.num_workers) * processes
    who = "1 loader thread reads" if readers == 1 else f"{readers:,} loader threads each read"
    return (
        f"at least {format_duration(shown / rate / readers)} a pass: {who} {rate:.0f} images/s "
        "(--images_per_second, the speed of training, gives an estimate)"
    )


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Context in which torch uses this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"
