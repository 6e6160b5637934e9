from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import yaml
from peft import AdaLoraConfig, LoraConfig

from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.lightning_cli import build_cli
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.planning import changes
from lit_lora.planning.batch_search import largest_batch
from lit_lora.planning.changes import CANDIDATES, cheapest_changes, ranked_changes
from lit_lora.planning.denoiser_traces import DenoiserTraces
from lit_lora.planning.device import find_device
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run, Sampling
from lit_lora.quantization import NF4, Int8


@pytest.fixture
def run(sd_folder: Path) -> Run:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=64, lora_alpha=64), base_dtype="float32")
    return Run(module, 4, 32, 32, cached=frozenset({"latents", "text"}), gradient_clip_val=1.0)


def test_a_run_that_fits_needs_no_change(run: Run) -> None:
    assert cheapest_changes(run, plan(run).needed) == []


def test_the_changes_make_it_fit(run: Run) -> None:
    before = plan(run)
    allowed = before.needed - 400_000
    told: list[str] = []
    found = cheapest_changes(run, allowed, before, told.append)
    assert found
    assert {f"with {one.change.description}" for one in found} <= set(told)
    assert [one.plan.fits(allowed) for one in found] == [False] * (len(found) - 1) + [True]
    assert all(one.saved > 0 for one in found)
    assert found[0].change.arguments == "--model.memory.gradient_checkpointing true"
    # The plan of a module that is made with this key.
    folder = run.module.family.pretrained_model_name_or_path
    module = LoraDiffusion(
        StableDiffusion(folder),
        LoraConfig(r=64, lora_alpha=64),
        base_dtype="float32",
        memory=MemoryOptions(gradient_checkpointing=True),
    )
    assert plan(replace(run, module=module)).phases == found[0].plan.phases


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
    kinds, keys = frozenset({"latents", "text"}), {"data.init_args.decoder.center_crop": True}
    run = Run(module, 2, 32, 32, device=find_device("H100"), cacheable=kinds, cache_keys=keys)
    found = [one[0] for one in (candidate(run) for candidate in CANDIDATES) if one]
    assert len(found) >= len(CANDIDATES) - 1  # bitsandbytes may be absent
    arguments = [argument for change in found for argument in change.arguments.split()]
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
    switches = {field.name: True for field in fields(MemoryOptions) if field.default is False}
    assert len(switches) == 7
    assert replace(cli.model.memory, text_encoder_quantization=None) == MemoryOptions(**switches)  # type: ignore[arg-type]
    assert type(cli.model.quantization) is type(cli.model.memory.text_encoder_quantization) is NF4
    assert cli.datamodule.decoder.center_crop
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


@pytest.fixture
def gpu_run(sd_folder: Path) -> Run:
    """A run over images on a GPU that could make a cache."""
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=4))
    return Run(module, 1, 32, 32, device=find_device("H100"), cacheable=frozenset({"latents", "text"}))


@dataclass(frozen=True)
class Needs:
    """A plan that needs so many bytes in each phase."""

    phases: dict[str, int]

    @property
    def needed(self) -> int:
        return max(self.phases.values())

    @property
    def peak(self) -> int:
        return self.needed

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])

    def fits(self, memory: int) -> bool:
        return self.needed <= memory

    def at_peak(self, kind: str) -> int:
        return self.needed


_BYTES = {"NoneType": 40, "Int8": 20, "NF4": 10, "Dense": 40}
"""Of the base, and of the text encoders, by quantization."""


def _needs(run: Run) -> Needs:
    """As in a run whose base and text encoders are all that counts, and whose VAE has the peak if it is not sliced."""
    module, memory = run.module, run.module.memory
    text, base = memory.text_encoder_quantization, _BYTES[type(module.quantization).__name__]
    encoders = _BYTES[type(text).__name__]
    training = base + (0 if "text" in run.cached else encoders) + (0 if memory.gradient_checkpointing else 50)
    vae = 0 if "latents" in run.cached else base + (5 if memory.vae_slicing else 60)
    stays = 0 if memory.offload_encoders or "text" in run.cached else 15
    drawing = base + encoders if run.sampling else 0
    return Needs({"backward": training + stays, "forward": vae, "sampling": drawing})


Found = Callable[[Run, int], list[str]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    """The options of the cheapest changes where :func:`_needs` plans."""
    monkeypatch.setattr(changes, "plan", _needs)

    def find(run: Run, memory: int) -> list[str]:
        steps = cheapest_changes(run, memory)
        assert steps is not None
        before = _needs(run).needed
        for step in steps:
            assert (step.plan.needed, step.saved) == (_needs(step.run).needed, before - step.plan.needed)
            before = step.plan.needed
        assert before <= memory
        return [step.change.description for step in steps]

    return find


CHECKPOINTING = "--model.memory.gradient_checkpointing true"
OFFLOADED = "--model.memory.offload_encoders true"


def test_a_cache_replaces_what_it_makes_unnecessary(gpu_run: Run, found: Found) -> None:
    assert found(gpu_run, 100) == [OFFLOADED, CHECKPOINTING]
    assert found(gpu_run, 70) == [CHECKPOINTING, "lit-lora cache, then a run over it"]
    crops = replace(gpu_run, cache_keys={"data.init_args.decoder.center_crop": True})
    both = "lit-lora cache, then a run over it, both with --data.init_args.decoder.center_crop true"
    assert found(crops, 70) == [CHECKPOINTING, both]


def test_text_encoders_are_quantized_where_no_cache_can_take_them_away(gpu_run: Run, found: Found) -> None:
    live = replace(gpu_run, cacheable=frozenset(), batch_size=2)
    sliced = "--model.memory.vae_slicing true"
    int8, nf4 = (f"--model.memory.text_encoder_quantization lit_lora.quantization.{kind}" for kind in ("Int8", "NF4"))
    # The VAE has the peak only after checkpointing, so that slicing is tried again.
    assert found(live, 80) == [OFFLOADED, CHECKPOINTING, sliced]
    assert found(live, 60) == [OFFLOADED, CHECKPOINTING, sliced, int8]
    # Each NF4 replaces an Int8, whose saving is not counted.
    base = "--model.quantization lit_lora.quantization.NF4"
    assert found(live, 20) == [OFFLOADED, CHECKPOINTING, sliced, nf4, base]


def test_text_encoders_that_draw_are_quantized_beside_a_cache(gpu_run: Run, found: Found) -> None:
    drawing = replace(gpu_run, sampling=Sampling())
    assert found(drawing, 60) == [
        CHECKPOINTING,
        "lit-lora cache, then a run over it",
        "--model.memory.text_encoder_quantization lit_lora.quantization.Int8",
    ]


def test_what_concerns_other_phases_is_tried_last(gpu_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "plan", _needs)
    told: list[str] = []
    memory = MemoryOptions(gradient_checkpointing=True, vae_slicing=True, offload_encoders=True)
    module = LoraDiffusion(gpu_run.module.family, LoraConfig(r=4), memory=memory)
    drawing = replace(gpu_run, module=module, batch_size=2, cached=frozenset({"text"}), sampling=Sampling())
    assert _needs(drawing).peak_phase == "sampling"
    assert cheapest_changes(drawing, 60, tell=told.append)
    assert not any("lit-lora cache" in one or "batch_size" in one for one in told)


def test_a_cache_that_exists_keeps_its_text_encoders(gpu_run: Run) -> None:
    there = replace(gpu_run, cached=gpu_run.cacheable, cacheable=frozenset(), sampling=Sampling())
    found = [candidate(there) for candidate in CANDIDATES]
    assert not any("text_encoder_quantization" in one[0].arguments or one[0].command for one in found if one)


def test_trained_text_encoders_are_not_cached(sd_folder: Path, gpu_run: Run) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=4), text_adapter=LoraConfig(r=2))
    found = [candidate(replace(gpu_run, module=module)) for candidate in CANDIDATES]
    [(change, changed)] = [one for one in found if one and one[0].command]
    assert (change.command, changed.cached) == ("lit-lora cache --text false", {"latents"})


def test_quantized_text_encoders_are_planned_as_with_the_key(gpu_run: Run) -> None:
    [(_, changed)] = [
        one
        for one in (candidate(gpu_run) for candidate in CANDIDATES)
        if one and "text_encoder_quantization lit_lora.quantization.Int8" in one[0].arguments
    ]
    family = StableDiffusion(gpu_run.module.family.pretrained_model_name_or_path)
    memory = MemoryOptions(text_encoder_quantization=Int8())
    made = replace(gpu_run, module=LoraDiffusion(family, LoraConfig(r=4), memory=memory))
    assert plan(changed).phases == plan(made).phases != plan(gpu_run).phases


def test_the_largest_batch_fits_and_one_more_does_not(run: Run) -> None:
    allowed = plan(replace(run, batch_size=5)).needed + 1000
    found = largest_batch(run, allowed)
    assert found is not None
    assert found.batch_size == 5
    assert found.fits(allowed)
    assert not plan(replace(run, batch_size=6)).fits(allowed)
    assert largest_batch(run, 1000) is None


def test_images_that_are_drawn_do_not_mislead_the_search(run: Run) -> None:
    drawing = replace(run, sampling=Sampling(8, height=128, width=128), batch_size=1)
    assert plan(drawing).peak_phase == plan(replace(drawing, batch_size=2)).peak_phase == "sampling"
    allowed = plan(replace(drawing, batch_size=12)).needed + 1000
    told: list[str] = []
    found = largest_batch(drawing, allowed, tell=told.append)
    assert found is not None
    assert found.fits(allowed)
    assert not any(f"with batch size {size}" in told for size in (4096, 2049))
    assert len(told) <= 6


def test_devices() -> None:
    assert find_device("rtx3060") == find_device("RTX 3060")
    with pytest.raises(UserError, match="device='abacus' is not known; choose cpu, T4"):
        find_device("abacus")
    work = [(10**12, 10**6, 2), (0, 10**9, 2)]
    assert find_device("H100").seconds(work) < find_device("T4").seconds(work)
    assert find_device("cpu").seconds(work) > find_device("T4").seconds(work)


@pytest.mark.parametrize(("device", "cached"), [("cpu", frozenset[str]()), ("RTX 4090", frozenset({"latents"}))])
def test_a_change_of_the_encoders_is_planned_with_the_denoiser_that_is_known(
    device: str, cached: frozenset[str], sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=4), memory=MemoryOptions(offload_blocks=True))
    sampling, options = Sampling(2, height=32, width=32), {"cached": cached, "averaged": True, "validation": True}
    run = Run(module, 2, 32, 32, device=find_device(device), sampling=sampling, **options)  # type: ignore[arg-type]
    plan(run)
    # What autocast keeps of the adapter is gone when the images are decoded.
    assert not any(run.traces.traces["sampling", run.sampling_options].kept.values())
    found = [one[1] for candidate in CANDIDATES if (one := candidate(run)) and one[1].traces is run.traces]
    changed = [one for one in found if one.denoiser_options == run.denoiser_options]
    assert len(changed) >= 3
    expected = [plan(replace(one, traces=DenoiserTraces())) for one in changed]
    for name in ("denoise", "add_adapter"):
        monkeypatch.setattr(StableDiffusion, name, None)
    assert [plan(one) for one in changed] == expected
    assert len({one.needed for one in expected}) > 1


def test_a_change_of_the_denoiser_is_planned_anew(run: Run) -> None:
    before = plan(run)
    smaller = LoraDiffusion(run.module.family, LoraConfig(r=2), base_dtype="float32")
    assert plan(replace(run, module=smaller)).needed < before.needed
    assert plan(replace(run, batch_size=2)).needed < before.needed


def test_images_are_drawn_once_for_all_batch_sizes(run: Run) -> None:
    of_images = replace(run, sampling=Sampling(2, height=32, width=32))
    plan(of_images)
    name = ("sampling", of_images.sampling_options)
    drawn = of_images.traces.traces[name]
    larger = replace(of_images, batch_size=6)
    expected = plan(replace(larger, traces=DenoiserTraces()))
    assert plan(larger) == expected
    assert of_images.traces.traces[name] is drawn


def test_other_inputs_of_the_denoiser_are_noticed(run: Run) -> None:
    before = plan(run)
    for name, trace in run.traces.traces.items():
        run.traces.traces[name] = replace(trace, given=None, peaks={}, work=[])
    assert plan(run) == before
