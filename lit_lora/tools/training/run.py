"""The steps of ``lit-lora train``: pack, choose, plan, cache, train."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.indexing.manifest import MANIFEST
from lit_lora.datamodules.packing.pack_plan import PLAN as PLAN_OF_SHARDS
from lit_lora.datamodules.packing.pack_plan import OtherShardsError
from lit_lora.datamodules.packing.pack_sets import find_sets
from lit_lora.datamodules.packing.source_sets import SourceSets, given_to_each, with_class_images
from lit_lora.early_stopping import stopped_early
from lit_lora.errors import UserError, check_above
from lit_lora.files import atomic_file
from lit_lora.folder_lock import only_run_in
from lit_lora.machine import available_memory
from lit_lora.planning.device import Device, chosen_device, is_here
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.run_checks import check_precision
from lit_lora.tools.cache import cache_shards
from lit_lora.tools.plan import memory_of, run_of_config
from lit_lora.tools.run_page import PLAN
from lit_lora.tools.run_page.write import write_page
from lit_lora.tools.training.base import Base, find_base
from lit_lora.tools.training.captions import caption_rule, rule_of_folders, rule_of_sets
from lit_lora.tools.training.choices import AS_GIVEN, Choice, Settings, choose, given_settings
from lit_lora.tools.training.config import comments_of, make_config, template_with, write_yaml
from lit_lora.tools.training.data import OneFolder, SeveralSets, TrainingData
from lit_lora.tools.training.fitting import (
    check_config,
    check_machine,
    check_model,
    fit,
    out_of_time,
    parts,
    parts_of,
    resuming,
)
from lit_lora.tools.training.memory import HOST_MARGIN, Fit, first_guess, fit_memory, free_memory, in_files
from lit_lora.tools.training.request import CONFIG, PACKED, Request, claim, forget_settings, has_trained
from lit_lora.tools.training.results import newest_checkpoint, newest_run, record, recorded, results_of
from lit_lora.tools.training.screen import ending, table
from lit_lora.tools.training.sources import check_alone
from lit_lora.visible import visible


def train_adapter(request: Request) -> None:
    """Run ``lit-lora train``.

    Raises:
        UserError: If torchrun started it, the folder, the base or an option is wrong, nothing fits into the memory, or the
            run's folder holds something else.
    """
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            "lit-lora train is one process, and starts those of --trainer.devices itself; for torchrun and srun, write the "
            "config with --dry_run --cache false, and start lit-lora fit --config with it"
        )
    base = find_base(request.base)
    folder = request.folders[0]
    check_alone(request)
    names = [one.stem if one.suffix == ".toml" else os.path.basename(os.path.realpath(one)) for one in request.folders]
    out = Path(request.out or Path("runs", f"{'-'.join(names)}-{base.name}"))
    device = _device_of(request)
    sets = find_sets(request.folders if request.has_sets else folder, out)
    if request.sources is not None and not base.takes_sources:
        raise UserError(
            f"sources={visible(request.source_folders[0])}, and {base.name} is trained without source images; take a base such "
            "as flux_kontext"
        )
    if sets is None and len(request.source_folders) > 1:
        raise UserError(f"sources has {len(request.source_folders)} folders for one folder of targets; give one")
    data: TrainingData
    if sets is None:
        data = OneFolder(request, base, out, caption_rule(folder, out, request.captions, request.trigger))
    else:
        rule_of = rule_of_folders if request.has_sets else rule_of_sets
        rule = rule_of(request.captions, request.trigger)
        data = SeveralSets(request, base, out, rule, _with_options(sets, request))
    if request.given:
        _check_given(base, request.given)
    if not request.dry_run:
        check_machine(
            template_with(base, request.given)["trainer"] | {"devices": request.given.get("trainer.devices", 1)}
        )
    with only_run_in(out, "train"):
        claim(out, request)
        _Training(request, base, out, device, data).run()


def _device_of(request: Request) -> Device:
    """The device to plan for: as given, or the one that the trainer will use."""
    accelerator = request.given.get("trainer.accelerator", "auto")
    device = chosen_device(request.device, accelerator)
    if device.is_cuda and accelerator == "cpu":
        raise UserError(f"device={request.device!r} is a GPU, and trainer.accelerator is cpu; leave one of them out")
    return device


def _is_replaced(key: str, given: Mapping[str, Any]) -> bool:
    return not {key, f"{key}.class_path"}.isdisjoint(given)


def _check_given(base: Base, given: Mapping[str, Any]) -> None:
    """Check names and types of keys of the config, and the trainer's options, before images are packed."""
    given_settings(given)
    try:
        Timer(given.get("trainer.max_time"))
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.max_time={given['trainer.max_time']!r} is no duration; give days, hours, minutes and seconds, such as "
            "00:01:30:00"
        ) from error
    template = template_with(base, given)
    check_precision(
        str(template["trainer"].get("precision", "32-true")), template["model"].get("base_dtype", "bfloat16")
    )
    check_config(template)


def _with_options(sets: SourceSets, request: Request) -> SourceSets:
    """The sets with what the command says of each."""
    repeats = request.repeats if isinstance(request.repeats, list) or request.repeats is None else [request.repeats]
    check_above(0, **{f"repeats[{number}]": one for number, one in enumerate(repeats or [])})
    sets = given_to_each(sets, repeats=repeats, sources=request.source_folders or None)
    if request.class_folder is None:
        return sets
    if request.sources is not None:
        raise UserError("class_images are drawn without a source image, and sources are given; leave one of them out")
    return with_class_images(sets, request.class_folder)


@dataclass(frozen=True)
class _Training:
    """A run, in its own folder."""

    request: Request
    base: Base
    out: Path
    device: Device
    data: TrainingData

    @property
    def config(self) -> Path:
        return self.out / CONFIG

    @property
    def given(self) -> dict[str, Any]:
        """Values for keys of the config that the user gives, by the command or a dataset.toml."""
        return self.data.keys | dict(self.request.given)

    def run(self) -> None:
        """Do what is left to do: a run that was stopped goes on."""
        print(f"output   {self.out}")
        given = (
            self.request.given
        )  # what a dataset.toml gives is known when it is packed, as is whether sets can be cached
        if not self.config.exists() and any(key.startswith("model.") for key in given):
            cached = isinstance(self.data, OneFolder) and self.data.cached
            check_model(template_with(self.base, given), cached)
        before = None if has_trained(self.out) else self._unpack()
        try:
            print("\n".join(self.data.pack()))
        except OtherShardsError as error:
            images = ", ".join(str(visible(folder)) for folder in self.request.folders)
            raise UserError(
                f"the images of {images} are not those that {self.out} was trained on, or their captions are not; name another "
                "folder with --out to train on what they are now, or put them back as they were to go on with this run"
            ) from error
        if before is not None and self.config.exists() and before != self._contents():
            forget_settings(self.out)  # other images may need others
        if not self.config.exists():
            self._choose()
        print(f"config   {self.config}")
        if self.request.dry_run:
            print("\nNext: the same command without --dry_run, which trains")
            return
        if (results := recorded(self.out)) is None:
            if self.data.cached and not self.data.has_cache:
                self._encode()
            results = self._fit()
        else:
            print("finished already; name another folder with --out to train again, or train longer with")
            print(f"lit-lora fit --config {shlex.quote(str(self.config))} --ckpt_path last --trainer.max_steps N")
        print(ending(results, self.data.prompts[0]))

    def _unpack(self) -> dict[Path, str]:
        """Have shards count as unfinished, since images may change while nothing is trained; returns their plans."""
        for name in PACKED:
            for manifest in (self.out / name).rglob(MANIFEST):
                manifest.unlink()
        return self._contents()

    def _contents(self) -> dict[Path, str]:
        """The plans of the packed shards, which tell of which files they are."""
        plans = [path for name in PACKED for path in (self.out / name).rglob(PLAN_OF_SHARDS)]
        return {path: path.read_text() for path in plans}

    def _choose(self) -> None:
        """Choose settings, show them and their plan, and write the config."""
        memory = memory_of(self.request.device_memory, self.device) if self.request.device_memory else None
        memory = memory or free_memory(self.device)
        settings = choose(self.base, self.data.images, given_settings(self.given))
        # Over a cache, encoders are there for drawing alone, and may wait in host memory at no cost.
        settings = replace(settings, offload_encoders=self.data.cached and self.device.is_cuda)
        patience = "" if self.base.is_embedded else "; a plan of a large base takes half a minute"
        print(f"planning for {format_bytes(memory)} on {self.device.name}{patience}")
        start = first_guess(memory, self.base.is_embedded)
        fit = fit_memory(settings, self._plan, memory, self.device.is_cuda, start, print)
        fit, on_disk = self._with_room_on_host(fit)
        said = f"{format_bytes(fit.plan.needed)} of {format_bytes(memory)}"
        # What the user gives in another way, such as another adapter or buckets, was not chosen here.
        chosen = [one for one in fit.settings.why if one.why == AS_GIVEN or not _is_replaced(one.key, self.given)]
        choices = [*self.data.choices(chosen), Choice("memory", said, fit.names, "model.memory")]
        if not fit.settings.draws:
            choices.append(
                Choice("drawing", "none", "they do not fit beside training; see lit-lora sample", "trainer.callbacks")
            )
        choices += on_disk
        if (uncached := self.data.uncached) is not None:
            choices.append(uncached)
        print(f"\n{table(choices)}\n\n{fit.plan.describe()}\n")
        fit.plan.write(self.out / PLAN)
        header = f"# lit-lora fit --config {shlex.quote(str(self.config))}\n"
        header += "# Chosen by lit-lora train; the reasons are beside the keys.\n"
        comments = comments_of(choices, self.data.argument if self.data.cached else None)
        with atomic_file(self.config) as part:
            part.write_text(header + write_yaml(self._config_of(fit.settings), comments), encoding="utf-8")

    def _with_room_on_host(self, fit: Fit) -> tuple[Fit, list[Choice]]:
        """What fits, with offloaded blocks in files if this machine's host memory is short, and the choice of that."""
        blocks = fit.settings.offload_blocks or self.given.get("model.memory.offload_blocks") is True
        if not blocks or not is_here(self.device) or self.given.get("model.convolutions") == "channels_last":
            return fit, []
        devices = self.given.get("trainer.devices", 1)
        processes = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
        needed, free = int(HOST_MARGIN * max(processes, 1) * fit.plan.host_bytes), available_memory()
        if needed <= free:
            return fit, []
        why = f"they take up to {format_bytes(needed)} of host memory, and {format_bytes(free)} are free"
        choice = Choice("blocks", "in files", why, "model.memory.offload_folder")
        return in_files(fit, self._plan, str(self.out)), [choice]

    def _config_of(self, settings: Settings) -> dict[str, Any]:
        data = self.data
        return make_config(self.base, settings, self.out, data.shards, data.rule.prefix, data.prompts, self.given)

    def _plan(self, settings: Settings) -> MemoryPlan:
        """The plan of a run with these settings, as ``lit-lora plan`` makes it."""
        cli = parts_of(self._config_of(settings))
        cached = ("latents", "text") if self.data.cached else ()
        described = run_of_config(cli.model, cli.datamodule, cli.config["trainer"], self.device, None, None, cached)
        return plan(replace(described, validation=False))  # it needs less than a step, and time to plan

    def _encode(self) -> None:
        """Encode images and captions once; on the CPU if the GPU is too small for the encoders."""
        print("encoding images and captions once, so that training needs no encoders")
        encoded = self.data.to_encode()
        names = dict.fromkeys(name for name, _, _ in encoded)
        for name, value, folder in encoded:
            others = [f"--data.init_args.{other}=null" for other in names if other != name]
            text = value if isinstance(value, str) else json.dumps(value)
            cli = parts(["fit", "--config", str(self.config), f"--data.init_args.{name}", text, *others])
            out = str(folder)
            try:
                cache_shards(cli.model, cli.datamodule, out=out)
            except UserError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise
                print("the GPU has too little memory for the encoders, so the CPU encodes")
                cache_shards(cli.model, cli.datamodule, out=out, device="cpu")

    def _fit(self) -> dict[str, str]:
        """Train as ``lit-lora fit`` does, from the last checkpoint if there is one."""
        arguments = ["fit", "--config", str(self.config)]
        if started := newest_run(self.out):
            print(f"resuming from the last checkpoint in {started}")
            arguments += resuming(started, self.out)
        try:
            trainer = fit(arguments)
        except SystemExit as error:
            told = isinstance(error, SIGTERMException)  # Preemption says where it saved
            if not told and (kept := newest_checkpoint(self.out)):
                print(f"kept     {kept}")
            raise
        _write_report(self.out)
        results = results_of(self.out)
        if trainer.global_step >= trainer.max_steps > 0 or out_of_time(trainer) or stopped_early(trainer):
            record(self.out, results)
        return results


def _write_report(out: Path) -> None:
    """Write the page about the newest run; without it the run is as good."""
    if (folder := newest_run(out)) is None:
        return
    try:
        write_page(folder)
    except Exception as error:
        print(f"the report could not be written: {error}; lit-lora report {shlex.quote(str(folder))} tries again")
