from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from peft import AdaLoraConfig, LoraConfig

from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.lightning_cli import build_cli
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.planning.batch_search import largest_batch
from lit_lora.planning.changes import CANDIDATES, cheapest_changes, ranked_changes
from lit_lora.planning.device import find_device
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run
from lit_lora.quantization import NF4


@pytest.fixture
def run(sd_folder: Path) -> Run:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=64, lora_alpha=64), base_dtype="float32")
    return Run(module, 4, 32, 32, cached=frozenset({"latents", "text"}), gradient_clip_val=1.0)


def test_a_run_that_fits_needs_no_change(run: Run) -> None:
    assert cheapest_changes(run, plan(run).needed) == []


def test_the_changes_make_it_fit(run: Run) -> None:
    before = plan(run)
    allowed = before.needed - 400_000
    changes = cheapest_changes(run, allowed, before)
    assert changes
    assert [one.plan.fits(allowed) for one in changes] == [False] * (len(changes) - 1) + [True]
    assert all(one.saved > 0 for one in changes)
    assert changes[0].change.arguments == "--model.memory.gradient_checkpointing true"
    # The plan of a module that is made with this key.
    folder = run.module.family.pretrained_model_name_or_path
    module = LoraDiffusion(
        StableDiffusion(folder),
        LoraConfig(r=64, lora_alpha=64),
        base_dtype="float32",
        memory=MemoryOptions(gradient_checkpointing=True),
    )
    assert plan(replace(run, module=module)).phases == changes[0].plan.phases


def test_nothing_helps_against_too_little(run: Run) -> None:
    family = StableDiffusion(run.module.family.pretrained_model_name_or_path)
    small = LoraDiffusion(
        family, LoraConfig(r=1, lora_alpha=1), quantization=NF4(), memory=MemoryOptions(gradient_checkpointing=True)
    )
    assert cheapest_changes(replace(run, module=small, batch_size=1), 1000) is None


def test_ranked_by_what_they_save(run: Run) -> None:
    ranked = ranked_changes(run)
    saved = [one.saved for one in ranked]
    assert saved == sorted(saved, reverse=True)
    assert all(size > 0 for size in saved)
    assert not run.module.memory.gradient_checkpointing


def test_every_change_can_be_pasted_into_a_command_line(sd_folder: Path, tmp_path: Path) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=4))
    run = Run(module, 2, 32, 32, device=find_device("H100"))
    changes = [found[0] for found in (candidate(run) for candidate in CANDIDATES) if found]
    assert len(changes) >= len(CANDIDATES) - 1  # bitsandbytes may be absent
    arguments = [argument for change in changes for argument in change.arguments.split()]
    config = {
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}},
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 4}},
        },
        "data": {"class_path": "WebDatasetDataModule", "init_args": {"train_shards": "shards", "resolution": 32}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = build_cli(["fit", "--config", str(path), "--trainer.accelerator", "cpu", *arguments], run=False)
    assert cli.model.memory == MemoryOptions(True, True, True, True, True, True, True)
    assert type(cli.model.quantization) is NF4
    assert (cli.model.adapter.r, cli.datamodule.batch_size, cli.trainer.accumulate_grad_batches) == (2, 1, 2)


def test_changes_that_the_adapters_method_rules_out_are_not_named(run: Run) -> None:
    adaptive = AdaLoraConfig(init_r=64, target_r=32, total_step=100, tinit=10, tfinal=10, lora_alpha=64)
    named = {}
    for config in (LoraConfig(r=64, lora_alpha=64), adaptive):
        family = StableDiffusion(run.module.family.pretrained_model_name_or_path)
        module = LoraDiffusion(family, config, base_dtype="float32")
        changed = [candidate(replace(run, module=module, gradient_clip_val=None)) for candidate in CANDIDATES]
        named[type(config)] = " ".join(found[0].arguments for found in changed if found)
    for key in ("optimizer_in_backward true", "--model.adapter.init_args.r 32"):
        assert key in named[LoraConfig]
        assert key not in named[AdaLoraConfig]


def test_the_largest_batch_fits_and_one_more_does_not(run: Run) -> None:
    allowed = plan(replace(run, batch_size=5)).needed + 1000
    found = largest_batch(run, allowed)
    assert found is not None
    assert found.batch_size == 5
    assert found.fits(allowed)
    assert not plan(replace(run, batch_size=6)).fits(allowed)
    assert largest_batch(run, 1000) is None


def test_devices() -> None:
    assert find_device("rtx3060") == find_device("RTX 3060")
    with pytest.raises(UserError, match="device='abacus' is not known; choose cpu, T4"):
        find_device("abacus")
    work = [(10**12, 10**6, 2), (0, 10**9, 2)]
    assert find_device("H100").seconds(work) < find_device("T4").seconds(work)
    assert find_device("cpu").seconds(work) > find_device("T4").seconds(work)
