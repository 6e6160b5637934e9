"""Programs that the tests of random kills start again and again, each in a process of its own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401  imported once for all
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from lit_lora import lightning_cli  # noqa: F401
from lit_lora.adapters import adapter_state
from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA
from lit_lora.cli import main
from lit_lora.datamodules import ImageDecoder, WebDatasetDataModule
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.distributed import jobs as job_pool
from lit_lora.families import StableDiffusion
from lit_lora.files import atomic_folder
from lit_lora.module import LoraDiffusion
from lit_lora.tools.cache import cache_shards

STEPS = 45


def run(program: Callable[..., None], output: Path, *arguments: Any) -> None:
    """Run a program as the leader of a process group, with everything that it prints in a file."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of a user
    os.register_at_fork(after_in_child=_close_locks)
    job_pool.get_context = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment]  # cheap to start
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    program(*arguments)


def _close_locks() -> None:
    """As in processes that are spawned, which have none of their parent's locks."""
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".lock"):
                os.close(int(descriptor))


def pack(folder: Path, images: Path, jobs: int) -> None:
    pack_folder(images, folder, samples_per_shard=3, jobs=jobs)


def index(folder: Path, jobs: int) -> None:
    DataIndex.load_or_build(sorted(folder.glob("*.tar")), jobs)


def cache(folder: Path, base: Path, shards: Path) -> None:
    module = LoraDiffusion(StableDiffusion(str(base)), LoraConfig(r=2, lora_alpha=2), base_dtype="float32")
    data = WebDatasetDataModule(
        str(shards), batch_size=2, resolution=16, num_workers=0, decoder=ImageDecoder(center_crop=True)
    )
    cache_shards(module, data, str(folder), batch_size=2)


def fit(folder: Path, config: Path) -> None:
    """``lit-lora fit --ckpt_path last``."""
    arguments = ["--trainer.default_root_dir", str(folder), "--trainer.callbacks.dirpath", str(folder / "saved")]
    status = main(["fit", "--config", str(config), *arguments, "--ckpt_path", "last"])
    if status:
        raise SystemExit(status)


class Recorder(LightningModule):
    """A LoRA over one frozen layer; writes down each batch that it is given."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(3 * 8 * 8, 4))
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.2)
        self.net: Any = inject_adapter_in_model(config, net)
        self.log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        line = {"step": self.global_step, "shown": list(zip(batch["key"], batch["slot"], strict=True))}
        os.write(self.log_file, (json.dumps(line) + "\n").encode())
        time.sleep(0.01)
        pixels = batch["pixel_values"].flatten(1).float() / 255
        return (self.net(pixels) ** 2).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Lightning warns without it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)

    def save_adapter(self, folder: Path) -> None:
        if self.trainer.is_global_zero:
            with atomic_folder(folder, marker="adapter.safetensors") as part:
                save_file(adapter_state(self.net), part / "adapter.safetensors")


def train(folder: Path, rank: int, world_size: int, port: int, data: dict[str, Any]) -> None:
    """Train on staged chunks or go on training; the last checkpoint is in ``folder / "saved"``."""
    if world_size > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world_size),
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    save = AdapterCheckpoint(folder / "saved", every_n_train_steps=4, save_last="link")
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[save, AdapterEMA()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Recorder(folder / f"shown-{rank}.jsonl"), WebDatasetDataModule(**data), ckpt_path="last")
