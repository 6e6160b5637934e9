"""Training over a quantised base: it learns, resumes exactly, draws, and its checkpoint goes with any quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch.utils.data import DataLoader

from lit_lora import AdapterCheckpoint, LoraDiffusion, StableDiffusion
from lit_lora.adapters import adapter_keys
from lit_lora.memory.options import MemoryOptions
from lit_lora.quantization import FP8, NF4, W8A8, Int8, Quantization

QUANTIZATIONS = [Int8(), W8A8(), FP8(), NF4()]


def _module(folder: Path, base: Quantization | None, **options: Any) -> LoraDiffusion:
    torch.manual_seed(4)
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"])

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    return LoraDiffusion(StableDiffusion(str(folder)), adapter, quantization=base, optimizer=optimizer, **options)


def _data(count: int) -> Any:
    """The same images in every batch; timesteps and noise follow from the number of the batch in the run."""
    generator = torch.Generator().manual_seed(6)
    batch = {
        "pixel_values": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "caption": ["a red seven", "a blue star"],
    }
    return DataLoader([batch] * count, batch_size=None)  # type: ignore[arg-type]


def _adapter(module: LoraDiffusion) -> dict[str, torch.Tensor]:
    keys = adapter_keys(module)
    return {key: value.clone() for key, value in module.state_dict().items() if key in keys}


@pytest.mark.parametrize("base", QUANTIZATIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_resumes_exactly(
    base: Quantization, gradient_checkpointing: bool, sd_folder: Path, tmp_path: Path, trainer_options: dict[str, Any]
) -> None:
    trainer_options["enable_checkpointing"] = True
    options = {"memory": MemoryOptions(gradient_checkpointing=gradient_checkpointing)}
    whole = _module(sd_folder, base, **options)
    Trainer(max_steps=4, **trainer_options).fit(whole, _data(4))
    saving = AdapterCheckpoint(dirpath=tmp_path / "ck", every_n_train_steps=2, save_last=True)
    first = _module(sd_folder, base, **options)
    Trainer(max_steps=2, callbacks=[saving], **trainer_options).fit(first, _data(4))
    second = _module(sd_folder, base, **options)
    trainer = Trainer(max_steps=4, callbacks=[saving], **trainer_options)
    trainer.fit(second, _data(4), ckpt_path=str(tmp_path / "ck" / "last.ckpt"))
    expected = _adapter(whole)
    assert all(torch.equal(value, expected[key]) for key, value in _adapter(second).items())
    started = _adapter(first)
    assert any(not torch.equal(value, started[key]) for key, value in expected.items())


def test_a_checkpoint_goes_with_any_storage(sd_folder: Path, tmp_path: Path, trainer_options: dict[str, Any]) -> None:
    trainer_options["enable_checkpointing"] = True
    saving = AdapterCheckpoint(dirpath=tmp_path / "ck", every_n_train_steps=1, save_last=True)
    module = _module(sd_folder, NF4())
    Trainer(max_steps=1, callbacks=[saving], **trainer_options).fit(module, _data(1))
    saved = torch.load(tmp_path / "ck" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == adapter_keys(module)
    trained = _adapter(module)
    for base in (None, Int8()):
        other = _module(sd_folder, base)
        with pytest.warns(UserWarning, match=r"model\.quantization NF4\(.*\) in the checkpoint, (Dense|Int8)"):
            Trainer(callbacks=[saving], **trainer_options).validate(
                other, _data(1), ckpt_path=str(tmp_path / "ck" / "last.ckpt"), verbose=False
            )
        assert all(torch.equal(value, trained[key]) for key, value in _adapter(other).items())


@pytest.mark.parametrize("base", QUANTIZATIONS, ids=lambda s: type(s).__name__)
def test_draws(base: Quantization, sd_folder: Path) -> None:
    module = _module(sd_folder, base)
    module.configure_model()
    images = module.generate(["a star"], [0], num_inference_steps=2, guidance_scale=2.0)
    assert images[0].size == (16, 16)


@pytest.mark.parametrize("optimizer", ["bitsandbytes", "torchao"])
@pytest.mark.filterwarnings("ignore:OptimState8bit does not implement:UserWarning")
def test_eight_bit_optimizers_train_and_resume(
    optimizer: str, deep_sd_folder: Path, tmp_path: Path, trainer_options: dict[str, Any]
) -> None:
    import importlib

    kind = importlib.import_module(f"{optimizer}.optim").AdamW8bit
    trainer_options["enable_checkpointing"] = True

    def module() -> LoraDiffusion:
        made = _module(deep_sd_folder, Int8())
        # Layers whose lora_A is large enough to be kept in eight bits. torchao compiles a step for each shape, hence alike ones.
        layers = ["mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"]
        made.adapter = LoraConfig(r=16, lora_alpha=16, target_modules=layers)
        small = {"min_8bit_size": 256} if optimizer == "bitsandbytes" else {"block_size": 64}
        made.optimizer = lambda parameters: kind(parameters, lr=1e-2, **small)
        return made

    whole = module()
    Trainer(max_steps=4, **trainer_options).fit(whole, _data(4))
    saving = AdapterCheckpoint(dirpath=tmp_path / "ck", every_n_train_steps=2, save_last=True)
    Trainer(max_steps=2, callbacks=[saving], **trainer_options).fit(module(), _data(4))
    second = module()
    trainer = Trainer(max_steps=4, callbacks=[saving], **trainer_options)
    trainer.fit(second, _data(4), ckpt_path=str(tmp_path / "ck" / "last.ckpt"))
    expected = _adapter(whole)
    assert all(torch.equal(value, expected[key]) for key, value in _adapter(second).items())
    states = [v for entry in trainer.optimizers[0].state.values() for v in entry.values() if torch.is_tensor(v)]
    assert any(v.dtype == torch.uint8 or type(v).__name__ == "OptimState8bit" for v in states)
