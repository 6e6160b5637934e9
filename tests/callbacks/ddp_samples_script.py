"""Two gloo processes train and sample: ``python ddp_samples_script.py FOLDER BASE``."""

import sys

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, SampleImages
from lit_lora.datamodules.webdataset_datamodule import WebDatasetDataModule
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion


def main() -> None:
    folder, base = sys.argv[1:]
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        max_epochs=-1,
        default_root_dir=folder,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[
            AdapterCheckpoint(every_n_train_steps=2, save_last="link"),
            AdapterEMA(),
            SampleImages(["a star"], every_n_steps=1, num_inference_steps=2),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = LoraDiffusion(StableDiffusion(base), LoraConfig(r=2, lora_alpha=2), base_dtype="float32")
    data = WebDatasetDataModule(f"{folder}/shards", val_samples=3, batch_size=2, resolution=16, num_workers=0)
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
