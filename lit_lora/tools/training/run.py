"""The steps of ``lit-lora train``: pack, choose, plan, cache, train."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.packing.pack import PackSummary, pack_folder
from lit_lora.datamodules.packing.pack_plan import MANIFEST, OtherShardsError
from lit_lora.datamodules.packing.pack_plan import PLAN as PLAN_OF_SHARDS
from lit_lora.datamodules.packing.pack_sets import PackedSets, find_sets, pack_sets
from lit_lora.datamodules.packing.source_sets import SourceSets, given_to_each, with_class_images
from lit_lora.datamodules.packing.splits import validation_folder
from lit_lora.early_stopping import stopped_early
from lit_lora.errors import UserError, check_above
from lit_lora.files import atomic_file
from lit_lora.folder_lock import only_run_in
from lit_lora.planning.device import Device, default_device, find_device
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.tools.cache import cache_shards
from lit_lora.tools.plan import memory_of, run_of_config
from lit_lora.tools.run_page import PLAN
from lit_lora.tools.run_page.write import write_page
from lit_lora.tools.shards import sets_lines
from lit_lora.tools.training.base import Base, find_base
from lit_lora.tools.training.captions import (
    PROMPTS,
    CaptionRule,
    caption_rule,
    prompts_for,
    rule_of_folders,
    rule_of_sets,
)
from lit_lora.tools.training.choices import Choice, Settings, choose, given_settings
from lit_lora.tools.training.config import comments_of, make_config, template_with, write_yaml
from lit_lora.tools.training.edit_prompts import write_edit_prompts
from lit_lora.tools.training.fitting import check_machine, fit, out_of_time, parts, parts_of, resuming
from lit_lora.tools.training.images import Images
from lit_lora.tools.training.memory import first_guess, fit_memory, free_memory
from lit_lora.tools.training.request import CONFIG, PACKED, Request, claim, forget_settings, has_trained
from lit_lora.tools.training.results import newest_checkpoint, newest_run, record, recorded, results_of
from lit_lora.tools.training.screen import ending, packed_lines, table
from lit_lora.tools.training.sources import can_be_cached, check_alone, keys_of, train_sets, uncached_choice
from lit_lora.visible import visible

_HELD_OUT = "data.init_args.val_samples"


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
    device = find_device(request.device) if request.device else default_device("auto")
    sets = find_sets(request.folders if request.has_sets else folder, out)
    if request.sources is not None and not base.takes_sources:
        raise UserError(
            f"sources={visible(request.source_folders[0])}, and {base.name} is trained without source images; take a base such "
            "as flux_kontext"
        )
    if sets is None:
        rule = caption_rule(folder, out, request.captions, request.trigger)
    else:
        of_folders = request.has_sets
        rule = (rule_of_folders if of_folders else rule_of_sets)(request.captions, request.trigger)
        sets = _with_options(sets, request)
    if request.given:
        _check_given(base, request.given)
    if not request.dry_run:
        check_machine(
            template_with(base, request.given)["trainer"] | {"devices": request.given.get("trainer.devices", 1)}
        )
    with only_run_in(out, "train"):
        claim(out, request)
        _Training(request, base, folder, out, device, rule, sets).run()


def _check_given(base: Base, given: Mapping[str, Any]) -> None:
    """Check names and types of keys of the config before images are packed."""
    given_settings(given)
    try:
        Timer(given.get("trainer.max_time"))
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.max_time={given['trainer.max_time']!r} is no duration; give days, hours, minutes and seconds, such as "
            "00:01:30:00"
        ) from error
    with suppress(UserError):  # what fits together is known when the other settings are chosen
        parts_of(template_with(base, given))


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
    folder: Path
    out: Path
    device: Device
    rule: CaptionRule
    sets: SourceSets | None

    @property
    def config(self) -> Path:
        return self.out / CONFIG

    @property
    def shards(self) -> Path:
        return self.out / PACKED[0]

    @property
    def cache(self) -> Path:
        return self.out / "cache"

    @cached_property
    def images(self) -> Images:
        """The packed images, whose shards are read once."""
        if self.packed_sets is None:
            return Images.of(*self.learned)
        sets, summaries = self.packed_sets.options["train_sets"], self.packed_sets.summaries
        shown = sum(one["repeats"] * summary.samples for one, summary in zip(sets, summaries, strict=True))
        return Images.of(*self.learned, samples=shown)

    @property
    def learned(self) -> list[str]:
        """Folders of the shards to learn from, which are those of all sets without class images."""
        if self.packed_sets is None:
            return [str(self.shards)]
        return [one["shards"] for one in self.packed_sets.options["train_sets"] if not one.get("prior")]

    @cached_property
    def packed_sets(self) -> PackedSets | None:
        """The sets, packed; None for one folder."""
        if self.sets is None:
            return None
        captions: dict[str, Any] = {"captions": self.rule.template, "fallback": self.rule.fallback}
        splits = _HELD_OUT not in self.request.given
        return pack_sets(self.sets, self.shards, validation=splits, max_bad=self.request.max_bad, **captions)

    @property
    def cached(self) -> bool:
        """Whether the run reads from a cache."""
        return self.request.cache and (self.packed_sets is None or can_be_cached(self.packed_sets))

    @property
    def given(self) -> dict[str, Any]:
        """Values for keys of the config that the user gives, by the command or a dataset.toml."""
        of_sets = {} if self.packed_sets is None else keys_of(self.packed_sets, self.base.template)
        no_held_out = {_HELD_OUT: 0} if self.validation_shards else {}
        return no_held_out | of_sets | dict(self.request.given)

    @cached_property
    def validation(self) -> Path | None:
        """The folder of validation images; None if there is none, or if the command says how many images are held out."""
        return None if self.sets is not None or _HELD_OUT in self.request.given else validation_folder(self.folder)

    @property
    def validation_shards(self) -> dict[Path, Path]:
        """Shards of validation images of their own folders, by the folder of their cache."""
        if self.packed_sets is not None:
            return {_of_validation(self.cache) / name: one.folder for name, one in self.packed_sets.held_out.items()}
        return {} if self.validation is None else {_of_validation(self.cache): _of_validation(self.shards)}

    @cached_property
    def held_out(self) -> PackSummary | None:
        """The validation images, packed; None if they have no folder of their own."""
        return None if self.validation is None else self._pack(self.validation, _of_validation(self.shards))

    def _pack(self, folder: Path, shards: Path) -> PackSummary:
        options: dict[str, Any] = {"captions": self.rule.template, "fallback": self.rule.fallback}
        if self.request.sources is not None:
            options["sources"] = self.request.source_folders[0] / folder.relative_to(self.folder)
        return pack_folder(folder, shards, max_bad=self.request.max_bad, **options)

    def _sources(self, cached: bool) -> dict[str, Any]:
        """Shards of the run, by the datamodule's arguments."""
        validation = [str(cache if cached else shards) for cache, shards in self.validation_shards.items()]
        beside = {"val_shards": validation if len(validation) > 1 else validation[0]} if validation else {}
        if self.packed_sets is None:
            return {"train_shards": str(self.cache if cached else self.shards), **beside}
        sets = train_sets(self.packed_sets, self.rule.prefix, self.cache if cached else None)
        return {"train_sets": sets, **beside}

    @cached_property
    def prompts(self) -> list[str]:
        """Prompts of the images that are drawn while training; of editing pairs, a file of them with their sources."""
        if self.base.takes_sources:
            file = write_edit_prompts(self.learned, self.out / "prompts", self.rule.prefix, PROMPTS)
            if file is not None:
                return [str(file)]
        return prompts_for(self.images.captions, self.rule.prefix)

    def run(self) -> None:
        """Do what is left to do: a run that was stopped goes on."""
        print(f"output   {self.out}")
        before = None if has_trained(self.out) else self._unpack()
        try:
            self._packed()
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
            if self.cached and not self._has_cache():
                self._encode()
            results = self._fit()
        else:
            print("finished already; name another folder with --out to train again")
        print(ending(results, self.prompts[0]))

    def _packed(self) -> None:
        """Pack what is not packed yet, and tell what there is."""
        if self.packed_sets is None:
            print("\n".join(packed_lines("packed", self._pack(self.folder, self.shards), self.validation)))
            if self.held_out is not None:
                print("\n".join(packed_lines("validate", self.held_out)))
        else:
            print("\n".join(sets_lines(self.packed_sets)))

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
        settings = choose(self.base, self.images, given_settings(self.given))
        # Over a cache, encoders are there for drawing alone, and may wait in host memory at no cost.
        settings = replace(settings, offload_encoders=self.cached and self.device.is_cuda)
        patience = "" if self.base.is_embedded else "; a plan of a large base takes half a minute"
        print(f"planning for {format_bytes(memory)} on {self.device.name}{patience}")
        start = first_guess(memory, self.base.is_embedded)
        fit = fit_memory(settings, self._plan, memory, self.device.is_cuda, start, print)
        said = f"{format_bytes(fit.plan.needed)} of {format_bytes(memory)}"
        choices = [
            self.rule.choice,
            *self._said_of_validation(fit.settings.why),
            Choice("memory", said, fit.names, "model.memory"),
        ]
        if not fit.settings.draws:
            choices.append(
                Choice("drawing", "none", "they do not fit beside training; see lit-lora sample", "trainer.callbacks")
            )
        if self.request.cache and self.packed_sets is not None and (uncached := uncached_choice(self.packed_sets)):
            choices.append(uncached)
        print(f"\n{table(choices)}\n\n{fit.plan.describe()}\n")
        fit.plan.write(self.out / PLAN)
        header = f"# lit-lora fit --config {shlex.quote(str(self.config))}\n"
        header += "# Chosen by lit-lora train; the reasons are beside the keys.\n"
        comments = comments_of(choices, self.cached and self.sets is None)
        with atomic_file(self.config) as part:
            part.write_text(header + write_yaml(self._config_of(fit.settings), comments), encoding="utf-8")

    def _said_of_validation(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices, with the images of a folder of their own among them."""
        if not self.validation_shards:
            return list(choices)
        if self.validation is not None and self.held_out is not None:
            reason, count = f"those of the folder {visible(self.validation.name)}", self.held_out.samples
        else:
            found = [] if self.packed_sets is None else self.packed_sets.held_out.values()
            reason, count = f"those of {len(found)} sets' own folders", sum(one.samples for one in found)
        reason += " are for validation"
        counts = f"{len(self.images):,} + {count:,}"
        return [one._replace(value=counts, why=reason) if one.name == "images" else one for one in choices]

    def _config_of(self, settings: Settings) -> dict[str, Any]:
        sources = self._sources(self.cached)
        return make_config(self.base, settings, self.out, sources, self.rule.prefix, self.prompts, self.given)

    def _has_cache(self) -> bool:
        folders = [self.cache] if self.sets is None else [self.cache / str(one) for one in range(len(self.sets.sets))]
        folders += self.validation_shards
        return all((folder / "cache.json").exists() for folder in folders)

    def _plan(self, settings: Settings) -> MemoryPlan:
        """The plan of a run with these settings, as ``lit-lora plan`` makes it."""
        cli = parts_of(self._config_of(settings))
        cached = ("latents", "text") if self.cached else ()
        described = run_of_config(cli.model, cli.datamodule, cli.config["trainer"], self.device, None, None, cached)
        return plan(replace(described, validation=False))  # it needs less than a step, and time to plan

    def _encode(self) -> None:
        """Encode images and captions once; on the CPU if the GPU is too small for the encoders."""
        print("encoding images and captions once, so that training needs no encoders")
        sources = self._sources(cached=False)
        training = next(iter(sources))
        encoded = [(training, sources[training], self.cache)]
        encoded += [("val_shards", str(shards), cache) for cache, shards in self.validation_shards.items()]
        for name, value, folder in encoded:
            others = [f"--data.init_args.{other}=null" for other in sources if other != name]
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
        except SystemExit:
            if kept := newest_checkpoint(self.out):
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


def _of_validation(folder: Path) -> Path:
    """The folder of the validation data beside that of the training data."""
    return folder.with_name(f"{folder.name}-validation")
