from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig

from lit_lora.adapters import adapter_state, inject, method_of
from lit_lora.adapters.methods import RebasedLoraMethod, is_rebased
from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import Int8
from tests.helpers import difference_in_plain_libraries, loader_of, make_batches, tiny_unet

STEPS = 4
KINDS = ["pissa", "pissa_niter_4", "olora"]
TARGETS = ["to_q", "to_v"]


def lora(kind: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=kind, **options)


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 77, 16)


def fit(
    base: Path, folder: Path, options: dict[str, Any], config: LoraConfig, steps: int = STEPS, resume_at: int = 0
) -> LoraDiffusion:
    torch.manual_seed(0)
    module = LoraDiffusion(StableDiffusion(str(base)), config, base_dtype="float32")
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    checkpoints = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(**options | {"enable_checkpointing": True, "max_steps": steps, "callbacks": [checkpoints]})
    batches = make_batches(STEPS)
    resume = str(folder / f"step={resume_at}.ckpt") if resume_at else None
    trainer.fit(module, loader_of(batches[resume_at:] + batches[:resume_at]), ckpt_path=resume)
    return module


def test_the_method_of_a_config() -> None:
    for kind in KINDS:
        assert is_rebased(kind)
        assert type(method_of(lora(kind))) is RebasedLoraMethod
    for other in (True, False, "gaussian", "orthogonal", "pissa_niter_", "pissa_niter_x", "eva"):
        assert not is_rebased(other)


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_the_output_is_that_of_the_base(kind: str) -> None:
    unet, values = tiny_unet(), inputs()
    with torch.no_grad():
        expected = unet(*values).sample
        adapted = inject(unet, lora(kind), ())
        torch.testing.assert_close(adapted(*values).sample, expected, rtol=1e-4, atol=1e-5)
        a = next(p for name, p in adapted.named_parameters() if "lora_A" in name)
        a.zero_()
        assert (adapted(*values).sample - expected).abs().max() > 1e-4  # the base has changed


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_v": 5}}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_lora_for_the_original_base(
    kind: str, options: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = fit(sd_folder, tmp_path / "run", trainer_options, lora(kind, **options))
    module.save_adapter(tmp_path / "adapter")
    in_diffusers, in_peft, from_base = difference_in_plain_libraries(
        module.family.denoiser, sd_folder, tmp_path / "adapter"
    )
    assert in_diffusers <= 1e-5
    assert in_peft <= 1e-5
    assert from_base > 1e-3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(kind: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(sd_folder, tmp_path, trainer_options, lora(kind))
    before = (tmp_path / f"step={STEPS}.adapter" / "adapter_model.safetensors").read_bytes()
    resumed = fit(sd_folder, tmp_path, trainer_options, lora(kind), resume_at=2)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        # The randomized decomposition draws other values here, so that the base moves, and is rounded.
        assert torch.equal(a, b) or (kind == "pissa_niter_4" and "base_layer" in name and torch.allclose(a, b)), name
    assert (tmp_path / f"step={STEPS}.adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_checkpoint_from_a_machine_that_rounds_otherwise() -> None:
    """Where the decomposition gives other signs, the base follows the checkpoint."""
    here = inject(tiny_unet(), lora("pissa"), ())
    original, values = copy.deepcopy(here), inputs()
    method = method_of(lora("pissa"))
    state = method.state(here)
    turned = {name: [-a, -b] for name, (a, b) in state["initial_lora"].items()}
    turned["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"][0] *= 0.5
    with torch.no_grad():
        expected = original(*values).sample
        method.restore(here, {"initial_lora": turned})
        for name, p in here.named_parameters():
            for layer, (a, b) in turned.items():
                if name.startswith(f"base_model.model.{layer}.lora_"):
                    p.copy_(a if "lora_A" in name else b)
        torch.testing.assert_close(here(*values).sample, expected, rtol=1e-4, atol=1e-5)
    exported, _ = method.export(here, adapter_state(here), {"use_rslora": False})
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    # Nothing was trained, so the files change nothing.
    assert (exported[f"{name}B.weight"] @ exported[f"{name}A.weight"]).abs().max() < 1e-6


def test_what_the_method_cannot_adapt(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), lora("pissa"), quantization=Int8())
    with pytest.raises(UserError, match="layers are stored as Int8; leave model"):
        Trainer(**trainer_options | {"max_steps": 1}).fit(module, loader_of(make_batches(1)))
    with pytest.raises(UserError, match="cannot be combined with use_dora"):
        inject(tiny_unet(), lora("olora", use_dora=True), ())
