"""What CordaInitialization and LoraGaInitialization have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import AdaLoraConfig, LoraConfig, PeftModel

from lit_lora.adapters.ranked_layer import ranked_layers
from lit_lora.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    CordaInitialization,
    EvaInitialization,
    LoraGaInitialization,
    LoraInjection,
)
from lit_lora.callbacks.rebased_initialization import LayerSum
from lit_lora.distributed import LitLoraFSDP
from lit_lora.errors import UserError
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import Int8
from tests.helpers import (
    Classifier,
    difference_in_plain_libraries,
    diffusion_module,
    loader_of,
    make_batches,
    processes,
)

STEPS = 5
KINDS = {"corda": CordaInitialization, "corda kpm": CordaInitialization, "lora_ga": LoraGaInitialization}


def initialization(kind: str) -> Callback:
    return KINDS[kind](steps=2, **({"mode": "kpm"} if kind == "corda kpm" else {}))


def diffusion(base: Path, **options: Any) -> LoraDiffusion:
    config = options.pop("adapter", None) or LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1"])
    return diffusion_module(base, config, **options)


def fit(
    module: LoraDiffusion,
    options: dict[str, Any],
    folder: Path,
    *callbacks: Callback,
    at: int = 0,
    resume: Path | None = None,
    **more: Any,
) -> None:
    checkpoints = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = options | {"max_steps": STEPS, "enable_checkpointing": True, "callbacks": [*callbacks, checkpoints]}
    made = make_batches(STEPS)
    Trainer(**options | more).fit(module, loader_of(made[at:] + made[:at]), ckpt_path=resume)


class Outputs(Callback):
    """What the denoiser computes after each step, and whether it is in training mode again."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        latents, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 16)))
        self.seen.append(pl_module.family.denoiser(latents, torch.tensor([10, 500]), text).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_with_the_outputs_of_the_base(
    kind: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    outputs, module = Outputs(), diffusion(sd_folder)
    module.configure_model()
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(module, trainer_options, tmp_path, initialization(kind), outputs)
    # The layers do not learn before, and what they are then initialized with changes no output.
    torch.testing.assert_close(outputs.seen[1], outputs.seen[0], rtol=1e-4, atol=1e-5)
    assert (outputs.seen[2] - outputs.seen[1]).abs().max() > 1e-4
    for name, value in module.named_parameters():
        adapted = "lora_" in name or any(f"{layer}.base_layer.weight" in name for layer in ("to_q", "to_v", "conv1"))
        assert torch.equal(before[name], value) != adapted, name
    optimizer = module.trainer.optimizers[0]
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS - 2}  # the averages begin anew


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_v": 5}}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_lora_for_the_original_base(
    kind: str, options: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1"], **options)
    module = diffusion(sd_folder, adapter=config)
    fit(module, trainer_options, tmp_path, initialization(kind), AdapterEMA(0.9))
    folder = tmp_path / f"step={STEPS}.adapter"
    in_diffusers, in_peft, from_base = difference_in_plain_libraries(module.family.denoiser, sd_folder, folder)
    assert in_diffusers <= 1e-5
    assert in_peft <= 1e-5
    assert from_base > 1e-3
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    with AdapterEMA.averaged(module.trainer.callbacks[1], module):  # type: ignore[attr-defined]
        folder = tmp_path / f"step={STEPS}.ema.adapter"
        in_diffusers, _, from_base = difference_in_plain_libraries(module.family.denoiser, sd_folder, folder)
    assert in_diffusers <= 1e-5
    assert from_base > 1e-4


@pytest.mark.parametrize(("kind", "at"), [("corda", 1), ("corda", 2), ("lora_ga", 1), ("lora_ga", 4)])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_is_exact(
    kind: str, at: int, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    whole, resumed = diffusion(sd_folder), diffusion(sd_folder)
    fit(whole, trainer_options, tmp_path / "one", initialization(kind))
    last = tmp_path / "one" / f"step={at}.ckpt"
    fit(resumed, trainer_options, tmp_path / "two", initialization(kind), at=at, resume=last)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    one, two = (tmp_path / run / f"step={STEPS}.adapter" / "adapter_model.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_in_a_module_of_another_project(kind: str, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module, injection = Classifier(), LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules=["0", "3"]))
    callbacks = [injection, initialization(kind)]
    Trainer(**trainer_options | {"max_steps": STEPS, "callbacks": callbacks}).fit(
        module, loader_of(make_batches(STEPS))
    )
    injection.save_adapter(tmp_path / "adapter")
    loaded, values = PeftModel.from_pretrained(Classifier(), tmp_path / "adapter"), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert (loaded.net(values) - module.net(values)).abs().max() <= 1e-5
        assert (Classifier().net(values) - module.net(values)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_accumulated_batches_and_checkpointed_blocks_give_the_same(
    kind: str, deep_sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Gradients of blocks that are computed again in the backward pass count once, and inputs twice like all others."""

    class AtTheEnd(Callback):
        values: dict[str, torch.Tensor]

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                self.values = {layer.name: (layer.b @ layer.a).detach() for layer in ranked_layers(pl_module)}

    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"])
    found = []
    for memory in (MemoryOptions(), MemoryOptions(gradient_checkpointing=True)):
        end = AtTheEnd()
        module = diffusion(deep_sd_folder, adapter=config, memory=memory)
        fit(module, trainer_options, tmp_path, initialization(kind), end, accumulate_grad_batches=2, max_steps=3)
        found.append(end.values)
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= 1e-3 * value.abs().max(), name


@pytest.mark.slow
def test_two_processes_have_the_same_adapter(sd_folder: Path, session_shards: Path, tmp_path: Path) -> None:
    processes(["-m", "tests.callbacks.rebased_script", tmp_path, sd_folder, session_shards], 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() == {"CordaInitialization", "LoraGaInitialization"}
    for kind, values in first.items():
        assert all(torch.equal(value, second[kind]["whole"][name]) for name, value in values["whole"].items())
        assert all(torch.equal(value, values["resumed"][name]) for name, value in values["whole"].items())
        assert any("base_layer" in name for name in values["whole"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": Int8()}, "layers are stored as Int8; leave model.quantization out"),
        ({"adapter": LoraConfig(r=2, use_dora=True, target_modules=["to_q"])}, "leave use_dora out"),
        (
            {"adapter": AdaLoraConfig(total_step=5, tinit=1, tfinal=1, target_modules=["to_q"])},
            "CordaInitialization changes the layers of LoRA, and the adapter is AdaLoraConfig",
        ),
        ({"compile_blocks": True}, "which compile_blocks does not allow"),
        ({"memory": MemoryOptions(offload_blocks=True)}, "which memory.offload_blocks does not allow"),
        ({"memory": MemoryOptions(optimizer_in_backward=True)}, "which memory.optimizer_in_backward does not allow"),
    ],
)
def test_modules_that_cannot_be_initialized(
    options: dict[str, Any], message: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(diffusion(sd_folder, **options), trainer_options, tmp_path, CordaInitialization())


def test_runs_that_cannot_be_initialized(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CordaInitialization and EvaInitialization cannot be combined"):
        fit(diffusion(sd_folder), trainer_options, tmp_path, CordaInitialization(), EvaInitialization())
    sharding = Trainer(**trainer_options | {"strategy": LitLoraFSDP()})
    with pytest.raises(UserError, match="LitLoraFSDP shards; use one device or strategy ddp"):
        CordaInitialization().setup(sharding, diffusion(sd_folder), "fit")
    fit(diffusion(sd_folder), trainer_options, tmp_path, max_steps=1)
    with pytest.raises(UserError, match="step 1 was saved without CordaInitialization"):
        fit(diffusion(sd_folder), trainer_options, tmp_path, CordaInitialization(), resume=tmp_path / "step=1.ckpt")
    fit(diffusion(sd_folder), trainer_options, tmp_path / "other", CordaInitialization(steps=1))
    resume = tmp_path / "other" / "step=2.ckpt"
    with pytest.raises(UserError, match=r"to_q is stored as Int8; resume without model\.quantization"):
        fit(diffusion(sd_folder, quantization=Int8()), trainer_options, tmp_path, CordaInitialization(), resume=resume)
    with pytest.raises(UserError, match="steps=0 is too small"):
        CordaInitialization(steps=0)


def test_sums_leave_out_what_is_not_finite() -> None:
    total = LayerSum()
    total.add(torch.tensor([[torch.nan]]), 3)
    total.add(torch.tensor([[0.0]]), 2)
    assert not total.is_usable
    total.add(torch.tensor([[1.5]]), 2)
    total.add(torch.tensor([[torch.inf]]), 2)
    assert total.is_usable
    assert (total.total, total.rows) == (1.5, 4)
    assert LayerSum(total.state()).state() == total.state()
