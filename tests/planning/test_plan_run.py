"""Plans of tiny models against what PyTorch's allocator hands out for them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
)
from safetensors import safe_open

import lit_lora.quantization
from benchmarks.allocator import peak_allocated
from lit_lora.byte_sizes import format_bytes
from lit_lora.callbacks import CordaInitialization, LoftqInitialization
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.memory.block_offload import BlockOffload
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM, PriorPreservation
from lit_lora.parameters import module_bytes
from lit_lora.planning.device import find_device
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan_run
from lit_lora.planning.run import Sampling
from lit_lora.planning.storage_meter import KINDS
from lit_lora.quantization import FP8, NF4, W8A8, Dense, Int8, Quantization
from tests.families.folders import FOLDERS, families_of_the_package
from tests.helpers import loader_of, make_batches

QUANTIZATIONS: tuple[type[Quantization], ...] = (Dense, Int8, W8A8, NF4, FP8)
TARGETS = ["to_q", "to_v"]
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=2, lora_alpha=2),
    "lora on convolutions": lambda: LoraConfig(r=2, lora_alpha=2, target_modules=["conv1", "to_q"]),
    "dora": lambda: LoraConfig(r=2, lora_alpha=2, use_dora=True),
    "pissa": lambda: LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa"),
    "loha": lambda: LoHaConfig(r=2, alpha=2),
    "lokr": lambda: LoKrConfig(r=2, alpha=2),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=[*TARGETS, "ff.net.2"], feedforward_modules=["ff.net.2"]),
    "vera": lambda: VeraConfig(r=4, target_modules=["to_q"]),
}


@pytest.fixture(scope="session")
def sd_folder(deep_sd_folder: Path) -> Path:
    """Plans are compared with measured peaks, to which blocks that halve and double the resolution belong."""
    return deep_sd_folder


def module_for(folder: Path, family: type[ModelFamily] = StableDiffusion, **options: Any) -> LoraDiffusion:
    adapter = options.pop("adapter", None) or LoraConfig(r=2, lora_alpha=2)
    return LoraDiffusion(family(str(folder)), adapter, **({"base_dtype": "float32"} | options))


def plan_of(module: LoraDiffusion, batch_size: int = 2, size: int = 32, **options: Any) -> MemoryPlan:
    return plan_run(module, batch_size, size, size, **options)


def training_peak(plan: MemoryPlan) -> int:
    """Without loading, which the measurement leaves out."""
    return max(sum(kinds.values()) for phase, kinds in plan.phases.items() if phase != "load")


def measured_peak(module: LoraDiffusion, options: dict[str, Any], batch_size: int = 2, size: int = 32) -> int:
    """Bytes of the weights, and what two steps take beside."""
    gc.collect()  # what earlier tests have left must not be freed within the measurement
    module.configure_model()
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    batches = make_batches(2, batch_size, size)
    return sum(storages.values()) + peak_allocated(
        lambda: Trainer(**options, max_steps=2).fit(module, loader_of(batches))
    )


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64, {}),
        (16, {"quantization": NF4(), "base_dtype": "bfloat16", "memory": MemoryOptions(gradient_checkpointing=True)}),
        (64, {"quantization": W8A8(), "base_dtype": "bfloat16", "memory": MemoryOptions(gradient_checkpointing=True)}),
        (16, {"adapter": LoraConfig(r=256, lora_alpha=256)}),
        (16, {"adapter": LoraConfig(r=256, lora_alpha=256), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}),
    ],
    ids=["float32", "nf4, checkpointing", "w8a8, checkpointing", "large adapter", "large adapter, sgd"],
)
def test_the_peak_is_what_the_allocator_hands_out(
    size: int, options: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    planned = training_peak(plan_of(module_for(sd_folder, **options), size=size))
    measured = measured_peak(module_for(sd_folder, **options), trainer_options, size=size)
    # Kernels for bfloat16 take less where the CPU has no AVX-512.
    assert 0.97 * measured < planned < 1.12 * measured


def test_every_family_and_storage_is_under_contract() -> None:
    assert set(FOLDERS) == families_of_the_package()
    named = {getattr(lit_lora.quantization, name) for name in lit_lora.quantization.__all__}
    assert {*QUANTIZATIONS, Quantization} == named


# Each family and each quantization once: the two know nothing of each other.
@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        *((family, Int8) for family in FOLDERS),
        *((StableDiffusion, kind) for kind in QUANTIZATIONS if kind is not Int8),
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_weights_of_a_plan_are_those_of_the_run(
    family: type[ModelFamily], quantization: type[Quantization], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(FOLDERS[family])

    def module() -> LoraDiffusion:
        stored = quantization()
        memory = MemoryOptions(text_encoder_quantization=stored)
        return module_for(folder, family, quantization=stored, base_dtype="bfloat16", memory=memory)

    plan = plan_of(module())
    real = module()
    real.configure_model()
    tensors = {t.untyped_storage().data_ptr(): t for t in (*real.parameters(), *real.buffers())}
    sizes = {True: 0, False: 0}
    for tensor in tensors.values():
        sizes[tensor.requires_grad] += tensor.untyped_storage().nbytes()
    for kinds in plan.phases.values():
        assert kinds["frozen weights"] == sizes[False]
        assert kinds["adapter"] == sizes[True]


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_can_be_planned(adapter: Callable[[], PeftConfig], sd_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(module_for(sd_folder, adapter=adapter(), base_dtype="bfloat16"), 1, 16)
    assert set(plan.phases) == {"load", "forward", "backward", "optimizer"}
    real = module_for(sd_folder, adapter=adapter(), base_dtype="bfloat16")
    real.configure_model()
    assert plan.adapter_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert plan.phases["forward"]["optimizer state"] >= 8 * plan.adapter_parameters
    for name, parameter in real.named_parameters():
        if "lora_E" in name:  # as AdaLoRA leaves it: the target is the mean rank
            parameter.data.zero_()[: real.adapter.target_r] = 1  # type: ignore[attr-defined]
    real.save_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = len(json.dumps(opened.metadata()))
    assert abs(plan.adapter_file_bytes - (file.stat().st_size - metadata)) < 300


@pytest.mark.parametrize(
    ("callback", "options"),
    [
        (CordaInitialization(steps=1), {}),
        (LoftqInitialization(files_for="original"), {"quantization": NF4(), "base_dtype": "bfloat16"}),
    ],
    ids=["CorDA", "LoftQ"],
)
def test_files_that_leave_out_first_values_have_twice_the_rank(
    callback: Callback, options: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(module_for(sd_folder, **options), 1, 16, leaves_out_start=True)
    real = module_for(sd_folder, **options)
    Trainer(**trainer_options, max_steps=2, callbacks=[callback]).fit(real, loader_of(make_batches(1)))
    real.save_adapter(tmp_path)
    assert abs(plan.adapter_file_bytes - (tmp_path / "adapter_model.safetensors").stat().st_size) < 1000


def test_planning_leaves_the_module_and_random_numbers_alone(sd_folder: Path) -> None:
    module = module_for(sd_folder, memory=MemoryOptions(gradient_checkpointing=True))
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    loaded = plan_of(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module._configured
    assert module.training
    assert loaded.phases == plan_of(module_for(sd_folder, memory=MemoryOptions(gradient_checkpointing=True))).phases


def test_more_and_less(sd_folder: Path) -> None:
    plain = plan_of(module_for(sd_folder))
    assert plan_of(module_for(sd_folder), 3, 48).peak > plain.peak
    half = plan_of(module_for(sd_folder, base_dtype="bfloat16"))
    quantised = plan_of(module_for(sd_folder, quantization=Int8(), base_dtype="bfloat16"))
    assert _frozen(quantised) < _frozen(half) < _frozen(plain)
    checkpointed = plan_of(module_for(sd_folder, memory=MemoryOptions(gradient_checkpointing=True)))
    cached = plan_of(module_for(sd_folder), cached=frozenset({"latents", "text"}))
    assert checkpointed.phases["backward"]["activations"] < plain.phases["backward"]["activations"]
    assert checkpointed.flops_per_step > plain.flops_per_step
    assert _frozen(cached) < _frozen(plain)
    assert cached.flops_per_step < plain.flops_per_step


def test_prior_preservation_needs_no_keys_in_a_plan(sd_folder: Path) -> None:
    objective = DDPM(prior=PriorPreservation("class/*"))
    assert plan_of(module_for(sd_folder, objective=objective)).peak == plan_of(module_for(sd_folder)).peak


def test_gradients_stay_from_batch_to_batch_while_they_accumulate(sd_folder: Path) -> None:
    adapter_bytes = 4 * plan_of(module_for(sd_folder)).adapter_parameters
    once, twice = (plan_of(module_for(sd_folder), accumulate_grad_batches=count) for count in (1, 2))
    assert twice.flops_per_step == 2 * once.flops_per_step
    assert once.phases["backward"]["gradients"] < adapter_bytes
    assert twice.phases["backward"]["gradients"] >= adapter_bytes


def test_eight_bit_optimizers_are_measured(sd_folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    adapter = LoraConfig(r=512, lora_alpha=512)
    options = {"optimizer": bitsandbytes.optim.AdamW8bit, "adapter": adapter}
    module = module_for(sd_folder, **options)
    planned = plan_of(module, 1, 16).phases["optimizer"]["optimizer state"]
    real = module_for(sd_folder, **options)
    real.configure_model()
    optimizer: Any = real.configure_optimizers()
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = {id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    assert planned == pytest.approx(sum(kept.values()), rel=0.01)
    assert planned < 4 * sum(p.numel() for p in real.parameters() if p.requires_grad)


def test_an_optimizer_that_looks_at_values_is_measured(sd_folder: Path) -> None:
    module = module_for(sd_folder, optimizer=lambda p: torch.optim.Adafactor(p, lr=0.1))
    plan = plan_of(module, 1, 16)
    assert 0 < plan.phases["optimizer"]["optimizer state"] < 4 * plan.adapter_parameters


def test_validation_and_sampling_have_phases_of_their_own(sd_folder: Path) -> None:
    options = {"validation": True, "cached": frozenset({"latents", "text"})}
    small = plan_of(module_for(sd_folder), sampling=Sampling(1, height=32, width=32), **options)
    large = plan_of(module_for(sd_folder), sampling=Sampling(4, height=32, width=32), **options)
    assert list(small.phases) == ["load", "forward", "backward", "optimizer", "validation", "sampling"]
    assert sum(small.phases["sampling"].values()) < sum(large.phases["sampling"].values())
    # Sampling needs the VAE and the text encoders, which training from a cache does without.
    assert small.phases["sampling"]["frozen weights"] > small.phases["validation"]["frozen weights"]
    for phase in ("validation", "sampling"):
        assert small.phases[phase]["optimizer state"] >= 8 * small.adapter_parameters
    assert sum(small.phases["validation"].values()) < sum(small.phases["forward"].values())


def test_the_kinds_are_complete(sd_folder: Path) -> None:
    plan = plan_of(module_for(sd_folder), validation=True, averaged=True)
    for kinds in plan.phases.values():
        assert tuple(kinds) == KINDS
        assert all(size >= 0 for size in kinds.values())
    assert plan.peak == sum(plan.phases[plan.peak_phase].values())
    assert plan.needed == plan.peak + sum(plan.beside.values())
    assert plan.as_json()["needed"] == plan.needed


def test_a_gpu_computes_norms_in_float32_under_autocast(sd_folder: Path) -> None:
    module = module_for(sd_folder, base_dtype="bfloat16")
    cached = frozenset({"latents", "text"})
    cpu, gpu = (plan_of(module, cached=cached, device=find_device(name)) for name in ("cpu", "rtx3060"))
    assert gpu.phases["backward"]["activations"] > 1.1 * cpu.phases["backward"]["activations"]
    assert "modeled for GPUs" in gpu.describe()
    assert "modeled" not in cpu.describe()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder"):
        plan_of(module_for(tmp_path))


def test_numbers_out_of_range(sd_folder: Path) -> None:
    with pytest.raises(UserError, match="batch_size=0 is too small"):
        plan_of(module_for(sd_folder), 0)
    with pytest.raises(UserError, match="choose from latents and text"):
        plan_of(module_for(sd_folder), cached=frozenset({"pixels"}))


def _frozen(plan: MemoryPlan) -> int:
    return plan.phases["forward"]["frozen weights"]


def test_trained_copies_of_layers_are_planned(sd_folder: Path) -> None:
    """Copying a tensor without contents as others are copied would break the process' memory."""
    needed = []
    for names in (None, ["conv1"]):
        adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], modules_to_save=names)
        module = LoraDiffusion(StableDiffusion(str(sd_folder)), adapter)
        planned = [plan_run(module, 2, 16, 16) for _ in range(2)]
        assert planned[0].phases == planned[1].phases
        needed.append(planned[0])
    assert needed[1].adapter_parameters > needed[0].adapter_parameters
    assert needed[1].peak > needed[0].peak


def test_weights_that_wait_in_host_memory(sd_folder: Path) -> None:
    gpu = find_device("rtx3060")

    def host_bytes(**memory: Any) -> int:
        return plan_of(module_for(sd_folder, memory=MemoryOptions(**memory)), device=gpu).host_bytes

    real = module_for(sd_folder)
    real.configure_model()
    encoders = sum(module_bytes(model) for model in real.family.frozen_encoding_models())
    blocks = BlockOffload(real.family.denoiser, real.family.block_classes, smallest_bytes=0).host_bytes
    assert host_bytes() == 0
    assert host_bytes(offload_encoders=True) == encoders
    assert host_bytes(offload_blocks=True) == blocks
    assert host_bytes(offload_blocks=True, offload_encoders=True) == blocks + encoders
    assert host_bytes(offload_blocks=True, offload_encoders=True, offload_folder="anywhere") == encoders
    planned = plan_of(module_for(sd_folder, memory=MemoryOptions(offload_blocks=True)), device=gpu)
    assert f"host     {format_bytes(blocks)} of weights wait in host memory" in planned.describe()
