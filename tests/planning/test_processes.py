"""What one of several processes is planned to hold, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig
from torch import Tensor

from lit_lora.distributed import LitLoraFSDP
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.parameters import trainable_parameters
from lit_lora.planning.device import find_device
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan_run
from lit_lora.planning.processes import DDP, FSDP2, Processes, Zero, processes_with

BUCKET = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0}


@pytest.fixture(scope="module")
def loaded(sd_folder: Path) -> LoraDiffusion:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=4, lora_alpha=2), base_dtype="float32")
    module.configure_model()
    return module


def planned(folder: Path, processes: Processes, **options: Any) -> MemoryPlan:
    module = LoraDiffusion(StableDiffusion(str(folder)), LoraConfig(r=4, lora_alpha=2), base_dtype="float32")
    return plan_run(module, 1, 16, 16, cached=frozenset({"latents", "text"}), processes=processes, **options)


def total(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def rows(tensor: Tensor, count: int) -> int:
    """Bytes of a shard of the first dimension, the last one padded."""
    return -(-tensor.shape[0] // count) * (tensor.nbytes // tensor.shape[0])


def frozen(model: Any) -> list[Tensor]:
    return [one for one in model.parameters() if not one.requires_grad]


def test_ddp_has_everything_and_buckets_for_the_gradients(loaded: LoraDiffusion, sd_folder: Path) -> None:
    alone, ddp, views = (
        planned(sd_folder, one) for one in (Processes(), DDP(2, "DDP"), DDP(2, "DDP", bucket_views=True))
    )
    adapter = total(trainable_parameters(loaded))
    for phase, kinds in alone.phases.items():
        assert ddp.phases[phase] == kinds | {"gradients": kinds["gradients"] + adapter}
        assert views.phases[phase] == kinds
    assert "  each of 2 processes, DDP:\n         full copies, and buckets of gradients\n" in ddp.describe()
    assert "process" not in alone.describe()


@pytest.mark.parametrize("count", [2, 3])
def test_fsdp_has_shards_and_the_blocks_in_use(loaded: LoraDiffusion, sd_folder: Path, count: int) -> None:
    plan = planned(sd_folder, FSDP2(count, "FSDP2", sharing=count))
    denoiser = loaded.family.denoiser
    shards = sum(rows(one, count) for one in frozen(denoiser))
    trained = trainable_parameters(loaded)
    last = plan.phases["optimizer"]
    assert last["frozen weights"] == shards + total(denoiser.buffers())
    assert last["adapter"] == last["gradients"] == sum(rows(one, count) for one in trained)
    assert last["optimizer state"] == 2 * last["adapter"] + 4 * len(trained)  # AdamW counts the steps of each
    gathered = plan.phases["forward"]["frozen weights"] - last["frozen weights"]
    assert 0 < gathered < total(frozen(denoiser))


def test_copies_are_shared_by_fewer_processes_than_there_are(sd_folder: Path) -> None:
    two, of_eight = (planned(sd_folder, processes_with(LitLoraFSDP(shard_size=2), count, 4)) for count in (2, 8))
    node = processes_with(LitLoraFSDP(shard_size="node"), 8, 4)
    assert two.phases == of_eight.phases
    assert isinstance(node, FSDP2)
    assert node.sharing == 4


def test_offloaded_shards_take_no_memory_of_a_gpu(loaded: LoraDiffusion, sd_folder: Path) -> None:
    processes = processes_with(LitLoraFSDP(cpu_offload=True), 2, 2)
    kinds = planned(sd_folder, processes, device=find_device("H100")).phases["optimizer"]
    denoiser = loaded.family.denoiser
    rounded = 512 * len([*denoiser.parameters(), *denoiser.buffers()])  # all that is left: the allocator rounds up
    assert kinds["frozen weights"] + kinds["adapter"] < rounded < total(frozen(denoiser))
    on_cpu = planned(sd_folder, processes).phases["optimizer"]
    assert on_cpu == planned(sd_folder, processes_with(LitLoraFSDP(), 2, 2)).phases["optimizer"]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_shards_gradients_and_optimizer_state(loaded: LoraDiffusion, sd_folder: Path, stage: int) -> None:
    plan = planned(sd_folder, Zero(2, f"ZeRO-{stage}", {"stage": stage, **BUCKET}))
    trained = trainable_parameters(loaded)
    numbers = sum(one.numel() for one in trained)
    kinds = plan.phases["optimizer"]
    assert kinds["frozen weights"] == total(frozen(loaded.family.denoiser)) + total(loaded.family.denoiser.buffers())
    assert kinds["adapter"] == 4 * numbers
    assert kinds["gradients"] == 2 * numbers
    assert kinds["optimizer state"] == 3 * 2 * numbers + 4  # the shard itself, two states, and the number of steps
    assert plan.phases["backward"]["gradients"] >= 4 * 1000 + 2 * numbers


def test_only_the_first_stage_accumulates_full_gradients(loaded: LoraDiffusion, sd_folder: Path) -> None:
    numbers = sum(one.numel() for one in trainable_parameters(loaded))
    sizes = []
    for stage in (1, 2):
        processes = Zero(2, f"ZeRO-{stage}", {"stage": stage, **BUCKET}, accumulates=True)
        kinds = planned(sd_folder, processes, accumulate_grad_batches=2).phases["optimizer"]
        sizes.append(kinds["gradients"])
    assert sizes == [6 * numbers, 2 * numbers]


def test_zero_3_shards_all_weights_but_small_ones(loaded: LoraDiffusion, sd_folder: Path) -> None:
    nothing_stays, all_stays = (
        planned(sd_folder, Zero(2, "ZeRO-3", {"stage": 3, "stage3_param_persistence_threshold": most, **BUCKET}))
        for most in (0, 10**9)
    )
    weights = frozen(loaded.family.denoiser)
    buffers = total(loaded.family.denoiser.buffers())
    shards = sum(-(-one.numel() // 2) * one.itemsize for one in weights)
    few, many = (plan.phases["optimizer"] for plan in (nothing_stays, all_stays))
    assert few["frozen weights"] == shards + buffers
    assert many["frozen weights"] == shards + total(weights) + buffers
    assert few["adapter"] * 3 == many["adapter"]
    assert few["gradients"] == 4 * 1000 + few["adapter"]
    assert 0 < nothing_stays.phases["forward"]["frozen weights"] - few["frozen weights"] < total(weights)


def test_strategies_are_known_by_what_they_are() -> None:
    assert processes_with("auto", 1, 1).description == ""
    assert type(processes_with("auto", 2, 2)) is DDP
    assert processes_with(DDPStrategy(gradient_as_bucket_view=True), 2, 2) == DDP(2, "DDP", bucket_views=True)
    other = processes_with("xla", 2, 2)
    assert other.description == "each of 2 processes, xla:\ncounted as full copies of all weights"
    assert torch.distributed.is_initialized() is False
