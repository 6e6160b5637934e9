"""LoraInjection under every strategy: two processes, or one for comparison, write the adapters that they train."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lit_lora.callbacks import AdapterCheckpoint, FiniteGradients, LoraInjection
from lit_lora.errors import UserError
from lit_lora.quantization import Int8
from tests.callbacks.foreign_modules import Classifier, LanguageModel, images, sentences

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
STRATEGIES = {
    "ddp": "ddp",
    "fsdp": "lit_lora_fsdp",
    "ZeRO-2": "lit_lora_deepspeed_stage_2",
    "ZeRO-3": "lit_lora_deepspeed_stage_3",
}
SINGLE = "auto"
KINDS = ("classifier", "language model", "empty group")


class LanguageModelWithHead(LanguageModel):
    """A language model with a trained layer beside it; the optimizer gets frozen weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.scale.bias)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        scale: torch.Tensor = self.scale(torch.ones(1, device=self.device))
        loss: torch.Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss * scale.squeeze()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(strategy: str, folder: Path, kind: str, epochs: int, resume: Path | None = None) -> None:
    """Train one of the modules and write its checkpoint and its adapter."""
    torch.manual_seed(0)
    batch_size = 4 // WORLD
    if kind == "language model":
        module: LightningModule = LanguageModelWithHead()
        adapter = LoraConfig(r=2, lora_alpha=2, target_modules="attention+mlp")
        injection = LoraInjection(adapter, "model", also_train=["scale.*"], quantization=Int8(skip=["lm_head"]))
        data = sentences(batch_size=batch_size)
    else:
        module, data = (WithoutDecay if kind == "empty group" else Classifier)(), images(batch_size=batch_size)
        injection = LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules="conv", modules_to_save=["fc"]), "net")
    torch.manual_seed(RANK)  # the first process's adapter is what all of them begin with
    sampler = DistributedSampler(data.dataset, WORLD, RANK, shuffle=False)
    data = DataLoader(data.dataset, batch_size, sampler=sampler, generator=torch.Generator())
    saving = AdapterCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        max_epochs=epochs,
        gradient_clip_val=0.5,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[injection, FiniteGradients(), saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)


class WithoutDecay(Classifier):
    """Has a group of biases and norms, which are all frozen, and a schedule."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in self.parameters() if p.ndim > 1]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def refusals() -> dict[str, str]:
    """What FSDP2 and DeepSpeed say to modules that they cannot train."""

    class Unequal(Classifier):
        def __init__(self) -> None:
            super().__init__()
            nn.init.normal_(self.net.conv1.weight, generator=torch.Generator().manual_seed(RANK))

    class Loose(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

    said = {}
    options: dict[str, Any] = {"accelerator": "cpu", "devices": WORLD, "max_epochs": 1}
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    for kind, strategy in ((Unequal, "fsdp"), (Loose, "fsdp"), (WithoutDecay, "ZeRO-2")):
        adapter = LoraConfig(r=2, lora_alpha=2, target_modules="conv")
        injection = LoraInjection(adapter, "net", also_train=["temperature"] if kind is Loose else ())
        try:
            Trainer(**options, **quiet, strategy=STRATEGIES[strategy], callbacks=[injection]).fit(kind(), images())
        except UserError as error:
            said[kind.__name__] = str(error)
    return said


def main() -> None:
    folder = Path(sys.argv[1])
    strategies = STRATEGIES if WORLD > 1 else {"single": SINGLE}
    for name, strategy in strategies.items():
        for kind in KINDS if "ZeRO" not in name else KINDS[:2]:
            train(strategy, folder / f"{name} {kind}", kind, epochs=1)
            saved = folder / f"single {kind}" / "last.ckpt"
            train(strategy, folder / f"{name} {kind} resumed", kind, epochs=2, resume=saved)
    if WORLD > 1:
        (folder / f"refusals-{RANK}.json").write_text(json.dumps(refusals()))


if __name__ == "__main__":
    main()
