from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import AdaLoraConfig, LoraConfig
from torch import nn

from lit_lora.adapters.ranked_layer import layer_ranks, ranked_layers
from lit_lora.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    EvaInitialization,
    FiniteGradients,
    LoraInjection,
    RankBudget,
)
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from tests.helpers import difference_in_plain_libraries, diffusion_module, loader_of, make_batches, processes

STEPS = 6


class Net(LightningModule):
    """Three layers: one with inputs of two directions, one with inputs of many, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.Linear(12, 5)
        self.wide = nn.Linear(12, 5)
        self.conv = nn.Conv2d(2, 3, 3, padding="same")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        outputs = (self.narrow(batch["narrow"]), self.wide(batch["wide"]), self.conv(batch["image"]))
        loss: torch.Tensor = sum(output.square().mean() for output in outputs)  # type: ignore[assignment]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(count: int = STEPS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(12, 2, generator=generator))[0].T
    made = []
    for _ in range(count):
        factors = torch.randn(64, 2, generator=generator) * torch.tensor([5.0, 2.0])
        wide = torch.randn(64, 12, generator=generator) * 0.5 ** torch.arange(12)
        image = torch.randn(4, 2, 8, 8, generator=generator)
        made.append({"narrow": factors @ directions, "wide": wide, "image": image})
    return made


def train(options: dict[str, Any], *callbacks: Callback, steps: int = STEPS) -> Net:
    module = Net()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["narrow", "wide", "conv"])
    trainer = Trainer(**options | {"max_steps": steps, "callbacks": [LoraInjection(config), *callbacks]})
    trainer.fit(module, loader_of(batches(steps)))
    return module


class AfterEva(Callback):
    """What the adapter is right after it was initialized."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            layers = ranked_layers(pl_module)
            self.values = {layer.name: (layer.a.detach().clone(), layer.b.detach().clone()) for layer in layers}


def test_the_rows_of_a_are_the_principal_directions_of_the_inputs(trainer_options: dict[str, Any]) -> None:
    seen = AfterEva(3)
    train(trainer_options, EvaInitialization(steps=3, rho=1), seen)
    for name in ("narrow", "wide"):
        a, b = seen.values[name]
        inputs = torch.cat([batch[name] for batch in batches()[:3]])
        expected = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False).Vh
        for row, direction in zip(a[: 2 if name == "narrow" else 4], expected, strict=False):
            assert abs(row @ direction) > 0.98, name
        assert not b.any()
    a = seen.values["conv"][0].flatten(1)
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-4)
    assert seen.values["conv"][0].shape == (4, 2, 3, 3)


def test_layers_whose_inputs_vary_in_more_directions_get_more_rank(trainer_options: dict[str, Any]) -> None:
    ranks = layer_ranks(train(trainer_options, EvaInitialization(steps=2)))
    assert sum(ranks.values()) == 12
    assert ranks["narrow"] <= 3
    assert max(ranks.values()) <= 8
    assert ranks["conv"] > ranks["narrow"]  # patches of noise
    same = layer_ranks(train(trainer_options, EvaInitialization(steps=2, rho=1)))
    assert set(same.values()) == {4}


class OneNaN(Callback):
    """The first batch holds a NaN in the inputs of one layer."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            batch["wide"] = batch["wide"].clone()
            batch["wide"][0, 0] = torch.nan


def test_a_batch_with_nan_is_left_out(trainer_options: dict[str, Any]) -> None:
    seen = AfterEva(3)
    with pytest.warns(UserWarning, match="step 1 is skipped"):
        train(trainer_options, OneNaN(), FiniteGradients(), EvaInitialization(steps=3, rho=1), seen)
    inputs = torch.cat([batch["wide"] for batch in batches()[1:4]])  # the first step is skipped
    expected = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False).Vh
    for row, direction in zip(seen.values["wide"][0], expected, strict=False):
        assert abs(row @ direction) > 0.98


def test_layers_with_too_few_inputs_are_named(trainer_options: dict[str, Any]) -> None:
    module, few = Net(), [{name: value[:1] for name, value in batch.items()} for batch in batches(3)]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["narrow", "wide", "conv"])
    options = trainer_options | {"max_steps": 3, "callbacks": [LoraInjection(config), EvaInitialization(steps=2)]}
    with pytest.warns(
        UserWarning, match=r"too few rows.*for 2 of 3 layers, the first is narrow: they begin as plain LoRA"
    ):
        Trainer(**options).fit(module, loader_of(few))


def diffusion(base: Path, **options: Any) -> LoraDiffusion:
    config = options.pop("adapter", None) or LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"])
    return diffusion_module(base, config, **options)


def fit(
    module: LoraDiffusion,
    options: dict[str, Any],
    folder: Path,
    *more: Callback,
    at: int = 0,
    resume: Path | None = None,
) -> None:
    checkpoints = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [EvaInitialization(steps=3), AdapterEMA(0.9), *more, checkpoints]
    trainer = Trainer(**options | {"max_steps": STEPS, "enable_checkpointing": True, "callbacks": callbacks})
    made = make_batches(STEPS)
    trainer.fit(module, loader_of(made[at:] + made[:at]), ckpt_path=resume)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_is_exact(
    at: int, more: bool, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    def budget() -> list[Callback]:
        return [RankBudget(mean_rank=2, start=0.6, stop=0.8, prunings=2)] if more else []

    whole, resumed = diffusion(sd_folder), diffusion(sd_folder)
    fit(whole, trainer_options, tmp_path / "one", *budget())
    fit(resumed, trainer_options, tmp_path / "two", *budget(), at=at, resume=tmp_path / "one" / f"step={at}.ckpt")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for folder in ("adapter", "ema.adapter"):
        one, two = (tmp_path / run / f"step={STEPS}.{folder}" / "adapter_model.safetensors" for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumes_whose_ranks_eva_left_as_they_were(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    def fit_one(module: LoraDiffusion, folder: Path, resume: Path | None = None) -> None:
        saving = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        own: list[Callback] = [EvaInitialization(steps=2, rho=1), saving]
        options = trainer_options | {"max_steps": 4, "enable_checkpointing": True, "callbacks": own}
        made = make_batches(4)
        Trainer(**options).fit(module, loader_of(made[3:] + made[:3] if resume else made), ckpt_path=resume)

    def module() -> LoraDiffusion:
        pattern = {"to_q": 2, "to_v": 1}
        return diffusion(sd_folder, adapter=LoraConfig(r=3, target_modules=["to_q", "to_v"], rank_pattern=pattern))

    whole, resumed = module(), module()
    fit_one(whole, tmp_path / "one")
    fit_one(resumed, tmp_path / "two", resume=tmp_path / "one" / "step=3.ckpt")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_files_draw_the_same_in_plain_diffusers(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = diffusion(sd_folder)
    fit(module, trainer_options, tmp_path)
    assert len(set(layer_ranks(module).values())) > 1
    folder = tmp_path / f"step={STEPS}.adapter"
    in_diffusers, in_peft, from_base = difference_in_plain_libraries(module.family.denoiser, sd_folder, folder)
    assert in_diffusers <= 1e-5
    assert in_peft <= 1e-5
    assert from_base > 1e-3


@pytest.mark.slow
def test_two_processes_have_the_same_adapter(sd_folder: Path, session_shards: Path, tmp_path: Path) -> None:
    processes(["-m", "tests.callbacks.eva_script", tmp_path, sd_folder, session_shards], 2, tmp_path)
    strategies = ("ddp", "lit_lora_fsdp", "lit_lora_deepspeed_stage_3")
    for strategy in strategies:
        whole, again = (torch.load(tmp_path / strategy / f"{rank}.pt") for rank in (0, 1))
        assert whole["adapter"].keys() == again["adapter"].keys()
        assert all(torch.equal(value, again["adapter"][name]) for name, value in whole["adapter"].items())
        assert all(torch.equal(value, whole["resumed"][name]) for name, value in whole["adapter"].items())
        assert len({value.shape[0] for name, value in whole["adapter"].items() if "lora_A" in name}) > 1
    ddp, *others = (torch.load(tmp_path / strategy / "0.pt")["adapter"] for strategy in strategies)
    for other in others:
        assert all(torch.allclose(value, other[name], rtol=1e-3, atol=1e-4) for name, value in ddp.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter": AdaLoraConfig(total_step=6, tinit=1, tfinal=1, target_modules=["to_q"])},
            "the adapter is AdaLoraConfig",
        ),
        ({"adapter": LoraConfig(r=2, use_dora=True, target_modules=["to_q"])}, "leave use_dora out"),
        ({"compile_blocks": True}, "compile_blocks to false"),
    ],
)
def test_runs_that_cannot_be_initialized(
    options: dict[str, Any], message: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(diffusion(sd_folder, **options), trainer_options, tmp_path)


def test_options_out_of_range() -> None:
    with pytest.raises(UserError, match="steps=0 is too small"):
        EvaInitialization(steps=0)
    with pytest.raises(UserError, match=r"rho=0.5 is too small"):
        EvaInitialization(rho=0.5)
