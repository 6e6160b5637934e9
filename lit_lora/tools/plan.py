"""``lit-lora plan``: memory, time and file sizes of a run before it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import StrategyRegistry
from tqdm import tqdm

from lit_lora.byte_sizes import format_bytes, parse_bytes
from lit_lora.callbacks.rank_budget import RankBudget
from lit_lora.datamodules.batches.buckets import MAX_RESOLUTION
from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
from lit_lora.distributed import check_strategy_name
from lit_lora.errors import UserError, check_least, check_most
from lit_lora.files import check_place
from lit_lora.lightning_cli import ToolCLI, build_cli
from lit_lora.module import LoraDiffusion
from lit_lora.planning.batch_search import largest_batch
from lit_lora.planning.cache_plan import plan_cache
from lit_lora.planning.changes import ChangedRun, cheapest_changes
from lit_lora.planning.data_options import cacheable, data_option, image_size
from lit_lora.planning.device import Device, chosen_device
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.planning.planned_memory import PlannedMemory
from lit_lora.planning.processes import Processes, processes_with
from lit_lora.planning.run import Run, Sampling
from lit_lora.planning.verdict import cache_verdict, verdict
from lit_lora.prompts import read_prompts
from lit_lora.run_checks import has_validation
from lit_lora.tools.shards_plan import describe as describe_data
from lit_lora.tools.shards_plan import devices_of, processes_of


def plan_command(arguments: list[str]) -> int:
    """Run ``lit-lora plan`` with the arguments of ``lit-lora fit`` and those of :func:`print_plan`.

    Returns:
        Exit status: 0, or 1 if the run does not fit into ``device_memory``.
    """
    cli = build_cli(["fit", *arguments], run=False, cli_class=_PlanCLI)
    return print_plan(cli.model, cli.datamodule, cli.config["trainer"], **cli.options)


def print_plan(
    module: LoraDiffusion,
    data: LightningDataModule,
    trainer: Any,
    device: str | None = None,
    device_memory: str | None = None,
    search: bool = False,
    batch_size: int | None = None,
    resolution: int | None = None,
    cached: list[str] | None = None,
    json: str | None = None,
) -> int:
    """Print the plan of a run: memory by phase and kind, size of the adapter's file, time of a step, and a summary of the data.

    Where the run trains from a cache, or a cache makes it fit, the plan has the memory of ``lit-lora cache`` by encoder too.

    Args:
        module: Module to train.
        data: Datamodule of the run; its data need not exist yet.
        trainer: Config of the trainer.
        device: Device that trains: cpu, or a GPU such as "RTX 3060" or H100; defaults to the device of this machine that
            trainer.accelerator chooses.
        device_memory: Memory of the device, in GB or with a unit. The command then reports whether the run fits and, if
            not, the cheapest changes that make it fit; its exit status is 1 if the run does not fit as it is.
        search: Find the largest batch size that fits into device_memory.
        batch_size: Number of samples in a batch; defaults to the datamodule's.
        resolution: Edge of a square image in pixels; defaults to the datamodule's.
        cached: Kinds of data that batches take from a cache (latents, text); defaults to those of the datamodule.
        json: JSON file to write the plan to; defaults to none.

    Returns:
        Exit status: 0, or 1 if the run does not fit into ``device_memory``.

    Raises:
        UserError: If the configs of the base model cannot be read, or a value is outside its range.
    """
    check_least(1, batch_size=batch_size, resolution=resolution)
    check_most(MAX_RESOLUTION, resolution=resolution)
    if json is not None and os.path.isdir(json):
        raise UserError(f"json={json!r} is a folder; name a file, such as {os.path.join(json, 'memory_plan.json')}")
    if json is not None:
        check_place(json)
    found = chosen_device(device, trainer["accelerator"])
    memory = memory_of(device_memory, found)
    if search and memory is None:
        raise UserError("search=true needs device_memory, for example 12GB, or a GPU as device")
    data_summary, data_readable = _data(data, trainer["max_steps"])
    from_cache = cached if cached is not None else getattr(data, "cached", ()) if data_readable else ()
    run = run_of_config(module, data, trainer, found, batch_size, resolution, from_cache)
    changes: list[ChangedRun] | None = []
    largest = None
    with _progress() as tell:
        tell("the run")
        planned = plan(run)
        if memory is not None and device_memory is not None:
            changes = cheapest_changes(run, memory, planned, tell)
        tell("lit-lora cache")
        encoding = _cache_plan(run, changes or [])
        if search and memory is not None:
            largest = largest_batch(run, memory, planned, tell)
    blocks = [planned.describe(encoding)]
    if (last := _last_size(planned, module, trainer)) is not None:
        blocks.append(_last_line(planned, last))
    if search and memory is not None:
        blocks.append(_largest_line(largest, memory))
    if memory is not None and device_memory is not None:
        blocks.append(verdict(planned, memory, changes))
        if encoding is not None and (too_large := cache_verdict(encoding, memory)):
            blocks.append(too_large)
    blocks.append(data_summary)
    print("\n\n".join(blocks))
    if json is not None:
        more = _findings(planned, memory, largest, changes or [])
        planned.write(json, last_adapter_parameters=last, cache=encoding and encoding.as_json(), **more)
    return 0 if memory is None or device_memory is None or planned.fits(memory) else 1


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows on a terminal what is being planned, in one line that goes away; elsewhere it shows nothing."""
    with tqdm(bar_format="planning {desc}", leave=False, dynamic_ncols=True, disable=None) as line:
        yield line.set_description_str


class _PlanCLI(ToolCLI):
    command = "lit-lora plan"
    function = staticmethod(print_plan)
    parts = frozenset({"module", "data", "trainer"})


def _findings(
    planned: MemoryPlan, memory: int | None, largest: MemoryPlan | None, changes: Iterable[ChangedRun]
) -> dict[str, Any]:
    """Entries that the command adds to the JSON object of a plan."""
    return {
        "device_memory": memory,
        "fits": None if memory is None else planned.fits(memory),
        "largest_batch_size": largest and largest.batch_size,
        "changes": [
            {"keys": one.change.keys, "command": one.change.command, "needed": one.plan.needed} for one in changes
        ],
    }


def _cache_plan(run: Run, changes: Sequence[ChangedRun]) -> PlannedMemory | None:
    """Plan of ``lit-lora cache`` with the config, or with the changes of it that propose a cache; None without a cache."""
    last = changes[-1].run if any(one.change.command for one in changes) else run
    return plan_cache(last) if last.cached else None


def run_of_config(
    module: LoraDiffusion,
    data: LightningDataModule,
    trainer: Any,
    device: Device,
    batch_size: int | None,
    resolution: int | None,
    cached: Iterable[str],
) -> Run:
    """The run that a config describes; see :func:`print_plan` for the arguments."""
    height, width = image_size(data, resolution)
    samples = _callback(trainer, "SampleImages")
    return Run(
        module,
        batch_size or data_option(data, "batch_size"),
        height,
        width,
        device=device,
        accumulate_grad_batches=int(trainer["accumulate_grad_batches"]),
        gradient_clip_val=_clip(trainer),
        precision=str(trainer["precision"] or "32-true"),
        cached=frozenset(cached),
        **cacheable(data),
        averaged=_callback(trainer, "AdapterEMA") is not None,
        validation=trainer["limit_val_batches"] not in (0, 0.0) and has_validation(data),
        sampling=None if samples is None else Sampling.of(read_prompts(samples["prompts"]), samples),
        processes=_processes(trainer),
        leaves_out_start=_leaves_out_start(trainer),
    )


def memory_of(device_memory: str | None, device: Device) -> int | None:
    """Memory in bytes; a number without a unit is in GB, and None means the device's own memory."""
    if device_memory is None:
        return device.memory
    plain = device_memory.strip()
    return parse_bytes("device_memory", f"{plain}GB" if re.fullmatch(r"[\d_.]+", plain) else plain)


def _data(data: LightningDataModule, max_steps: int) -> tuple[str, bool]:
    """A summary of the data as text, and whether the data can be read."""
    if not isinstance(data, WebDatasetDataModule):
        return f"data: no summary, since a {type(data).__name__} does not plan its batches", False
    try:
        return describe_data(data, max_steps=max_steps), True
    except (UserError, OSError) as error:
        return f"data: no summary, since it cannot be read yet ({str(error).splitlines()[0]})", False


def _clip(trainer: Any) -> float | None:
    """Norm to which the trainer clips gradients; None if it does not clip by norm."""
    return trainer["gradient_clip_val"] if trainer["gradient_clip_algorithm"] in (None, "norm") else None


def _processes(trainer: Any) -> Processes:
    """The processes of a run and what each holds, from the config of its trainer.

    Raises:
        UserError: If no strategy has the name, or its options exclude each other.
    """
    strategy = trainer["strategy"]
    check_strategy_name(strategy)
    if isinstance(strategy, str) and strategy != "auto":
        strategy = StrategyRegistry.get(strategy)
    elif isinstance(strategy, Mapping | Namespace):
        strategy = resolve_name(strategy["class_path"])(**dict(strategy.get("init_args") or {}))
    accumulates = int(trainer["accumulate_grad_batches"]) > 1
    return processes_with(strategy, processes_of(trainer), devices_of(trainer), accumulates)


def _callback(trainer: Any, name: str) -> Any:
    """Config of the first callback of this class; None if there is none."""
    callbacks = trainer["callbacks"] or []
    for callback in callbacks if isinstance(callbacks, Sequence) else [callbacks]:
        if callback["class_path"].rpartition(".")[2] == name:
            return callback.get("init_args") or {}
    return None


def _leaves_out_start(trainer: Any) -> bool:
    """Whether a callback gives the adapter first values that its files leave out."""
    if any(_callback(trainer, name) is not None for name in ("CordaInitialization", "LoraGaInitialization")):
        return True
    return (_callback(trainer, "LoftqInitialization") or {}).get("files_for") == "original"


def _last_size(planned: MemoryPlan, module: LoraDiffusion, trainer: Any) -> int | None:
    """Number of parameters that RankBudget leaves; None without it."""
    options = _callback(trainer, "RankBudget")
    if options is None:
        return None
    rank: int = getattr(next(iter(module.adapter_configs), None), "r", 1)
    other_bytes = planned.adapter_file_bytes - 4 * planned.adapter_parameters
    return RankBudget(**options).last_parameters(planned.adapter_parameters, rank, other_bytes)


def _last_line(planned: MemoryPlan, last: int) -> str:
    """What RankBudget frees, as text."""
    per_parameter = sum(planned.phases["optimizer"][kind] for kind in ("adapter", "gradients", "optimizer state"))
    removed = planned.adapter_parameters - last
    file_bytes = planned.adapter_file_bytes - 4 * removed
    freed = removed / planned.adapter_parameters * per_parameter
    return (
        f"RankBudget leaves about {last:,} of the {planned.adapter_parameters:,} parameters, in a file\n"
        f"of {format_bytes(file_bytes)}, and frees {format_bytes(freed)} of weights, gradients and optimizer state"
    )


def _largest_line(largest: MemoryPlan | None, memory: int) -> str:
    if largest is None:
        return f"largest batch: none; one sample already needs more than {format_bytes(memory)}"
    return f"largest batch: {largest.batch_size}, which needs {format_bytes(largest.needed)} of {format_bytes(memory)}"
