"""The steps of ``lit-lora train``: pack, choose, plan, cache, train."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.files import atomic_file
from lit_lora.folder_lock import only_run_in
from lit_lora.lightning_cli import ToolCLI, build_cli, run
from lit_lora.planning.device import Device, default_device, find_device
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.tools.cache import cache_shards
from lit_lora.tools.plan import memory_of, run_of_config
from lit_lora.tools.training.base import Base, find_base
from lit_lora.tools.training.captions import CaptionRule, caption_rule, prompts_for
from lit_lora.tools.training.choices import KEYS, Choice, Settings, choose
from lit_lora.tools.training.config import make_config, write_yaml
from lit_lora.tools.training.images import Images
from lit_lora.tools.training.memory import fit_memory, free_memory
from lit_lora.tools.training.request import Request, claim
from lit_lora.tools.training.screen import ending, table

CONFIG = "config.yaml"


def train_adapter(request: Request) -> None:
    """Run ``lit-lora train``.

    Raises:
        UserError: If the folder, the base or an option is wrong, nothing fits into the memory, or the run's folder holds
            something else.
    """
    base = find_base(request.base)
    folder = Path(request.folder).expanduser()
    out = Path(request.out or Path("runs", f"{folder.resolve().name}-{base.name}"))
    device = find_device(request.device) if request.device else default_device("auto")
    memory = memory_of(request.device_memory, device) if request.device_memory else free_memory(device)
    assert memory is not None
    rule = caption_rule(folder, out, request.captions, request.trigger)
    with only_run_in(out, "train"):
        claim(out, request)
        if not (out / CONFIG).exists():
            _prepare(request, base, folder, out, rule, device, memory)
        print(f"config   {out / CONFIG}")
        if request.dry_run:
            print("\nNext: the same command without --dry_run, which trains")
            return
        _cache(request, out)
        cli = run(["fit", "--config", str(out / CONFIG), "--ckpt_path", "last"])
        print(ending(cli.trainer, out, prompts_for(["a"], rule.prefix)[0]))


def _prepare(
    request: Request, base: Base, folder: Path, out: Path, rule: CaptionRule, device: Device, memory: int
) -> None:
    """Pack, choose, plan, and write the config."""
    pack_folder(folder, out / "shards", captions=rule.template, max_bad=request.max_bad)
    images = Images.of(out / "shards")
    given = {KEYS[key]: value for key, value in request.given.items() if key in KEYS}
    settings = choose(base, images, given)
    prompts = prompts_for(images.captions, rule.prefix)

    def config_of(settings: Settings) -> dict[str, Any]:
        shards = out / ("cache" if request.cache else "shards")
        return make_config(base, settings, out, shards, rule.prefix, prompts, request.given)

    planner = _Planner(config_of, device, request.cache)
    fit = fit_memory(settings, planner, memory, device.is_cuda, print)
    memory_choice = Choice("memory", fit.rung.what, f"{format_bytes(fit.plan.needed)} of {format_bytes(memory)}")
    choices = [rule.choice, *fit.settings.why, memory_choice]
    print(table(choices), fit.plan.describe(), sep="\n\n", end="\n\n")
    header = f"# lit-lora fit --config {shlex.quote(str(out / CONFIG))}\n"
    with atomic_file(out / CONFIG) as part:
        part.write_text(header + write_yaml(config_of(fit.settings), {}), encoding="utf-8")


class _Planner:
    """Plans the memory of a config, as ``lit-lora plan`` does."""

    def __init__(self, config_of: Callable[[Settings], dict[str, Any]], device: Device, cache: bool) -> None:
        self.config_of, self.device = config_of, device
        self.cached = ("latents", "text") if cache else ()

    def __call__(self, settings: Settings) -> MemoryPlan:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(write_yaml(self.config_of(settings), {}))
            file.flush()
            cli = build_cli(["fit", "--config", file.name], run=False, cli_class=_PartsCLI)
        return plan(
            run_of_config(cli.model, cli.datamodule, cli.config["trainer"], self.device, None, None, self.cached)
        )


def _nothing() -> None:
    """Build the parts of a run."""


class _PartsCLI(ToolCLI):
    command = "lit-lora train"
    function = staticmethod(_nothing)
    parts = frozenset()


def _cache(request: Request, out: Path) -> None:
    """Encode images and captions, unless this was done before."""
    if not request.cache or (out / "cache" / "cache.json").exists():
        return
    shards = ["--data.init_args.train_shards", str(out / "shards")]
    cli = build_cli(["fit", "--config", str(out / CONFIG), *shards], run=False, cli_class=_PartsCLI)
    cache_shards(cli.model, cli.datamodule, out=str(out / "cache"))
