"""Time of a training step under the Trainer compared with a bare loop: ``python benchmarks/step_overhead.py``.

Both train the same model and adapter on the same batch with the same optimizer, in one process. They take turns step by step, so
that changes of the machine's speed affect both. The bare loop is plain PyTorch: encode, add noise, denoise, loss, backward, clip,
step. The Trainer runs with the callbacks of ``lit-lora fit``, TensorBoard logging (``--log-every``) and the checkpoint callback.
Its time is measured from the end of one step to the end of the next, without the bare loop's step in between. With ``--plain``
the Trainer runs the bare loop's computation as a LightningModule, without a progress bar: what Lightning itself takes. With
``--fused`` the Trainer's AdamW is fused, as in every file of ``configs``, the bare loop's is torch's default: what users get.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from lit_lora import AdapterCheckpoint, LoraDiffusion, StableDiffusion
from lit_lora.callbacks import FiniteGradients, StepMetrics, StepProgress


class BareLoop:
    """The computation of the training step without Lightning and without this project's module."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.family = StableDiffusion("embedded")
        self.family.load(torch.float32)
        self.family.add_adapter(LoraConfig(r=16, lora_alpha=16))
        self.scheduler = DDPMScheduler.from_config(self.family.scheduler_config)
        self.parameters = [p for p in self.family.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.batch = batch

    def loss(self) -> Tensor:
        vae, encoders = self.family.vae, self.family.encoders
        with torch.no_grad():
            pixels = self.batch["pixel_values"].float() / 127.5 - 1
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            ids = encoders["tokenizer"](
                self.batch["caption"], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            hidden = encoders["text_encoder"](ids)[0]
        noise = torch.randn_like(latents)
        t = torch.randint(1000, (len(latents),))
        prediction = self.family.denoiser(self.scheduler.add_noise(latents, noise, t), t, hidden).sample
        return F.mse_loss(prediction, noise)

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PlainModule(LightningModule):
    """The bare loop's computation as a LightningModule."""

    def __init__(self, bare: BareLoop) -> None:
        super().__init__()
        self.bare = bare
        self.denoiser = bare.family.denoiser

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.bare.loss()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.bare.optimizer


class TakeTurns(Callback):
    """Runs one step of the bare loop after each step under the Trainer, and times both."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare = bare
        self.trainer_times: list[float] = []
        self.bare_times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.trainer_times.append(now - self.mark)
        self.bare.step()
        self.mark = time.perf_counter()
        self.bare_times.append(self.mark - now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=20, help="steps before the measured steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 (default) keeps torch's own number")
    parser.add_argument("--log-every", type=int, default=1, help="steps from one that is logged to the next")
    parser.add_argument(
        "--plain", action="store_true", help="a plain LightningModule in place of this project's module"
    )
    parser.add_argument("--fused", action="store_true", help="fused AdamW under the Trainer, as in configs")
    options = parser.parse_args()
    if options.plain and options.fused:
        parser.error("--plain uses the bare loop's optimizer: leave --plain or --fused out")
    if options.threads:
        torch.set_num_threads(options.threads)
    seed_everything(0)
    size = (options.batch_size, 3, 32, 32)
    batch = {
        "pixel_values": torch.randint(256, size, dtype=torch.uint8),
        "caption": ["a red seven on white"] * options.batch_size,
    }
    turns = TakeTurns(BareLoop(batch))
    steps = options.steps + options.warm_up
    module: LightningModule
    callbacks: list[Callback]
    if options.plain:
        module, callbacks = PlainModule(BareLoop(batch)), [ModelCheckpoint(every_n_train_steps=steps)]
    else:
        module = LoraDiffusion(
            StableDiffusion("embedded"),
            LoraConfig(r=16, lora_alpha=16),
            optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=options.fused),
            base_dtype="float32",
        )
        callbacks = [StepProgress(), StepMetrics(), FiniteGradients(), AdapterCheckpoint(every_n_train_steps=steps)]
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=options.log_every,
            logger=TensorBoardLogger(folder),
            callbacks=[turns, *callbacks],
            enable_progress_bar=not options.plain,
            enable_model_summary=False,
        ).fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    under, bare = turns.trainer_times[options.warm_up :], turns.bare_times[options.warm_up :]
    ratio = statistics.median(a / b for a, b in zip(under, bare, strict=True))
    print(f"\n{options.steps} steps of {options.batch_size} images, {torch.get_num_threads()} threads")
    print(f"bare loop      {statistics.median(bare) * 1000:8.1f} ms (median)")
    print(f"under Trainer  {statistics.median(under) * 1000:8.1f} ms (median)")
    print(f"ratio          {ratio:8.3f} (median of the pairs), {sum(under) / sum(bare):.3f} (of the sums)")


if __name__ == "__main__":
    main()
