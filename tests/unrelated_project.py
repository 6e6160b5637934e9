"""Trains two steps from somebody else's project: ``python unrelated_project.py NEW_FOLDER``.

The folder gets ``callbacks`` and ``datamodules`` packages of its own, and nothing of this repository is on the path.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MAIN = """
import callbacks, datamodules
from lightning.pytorch import Trainer
from peft import LoraConfig

import lit_lora
from lit_lora import AdapterCheckpoint, AdapterEMA, LoraDiffusion, SampleImages, StableDiffusion, WebDatasetDataModule

assert callbacks.OURS and datamodules.OURS, "the project's own packages must win"
assert not hasattr(callbacks, "AdapterCheckpoint")

from pathlib import Path
from PIL import Image
from lit_lora.datamodules.packing.pack import pack_folder

images = Path("images")
images.mkdir()
for i in range(8):
    Image.new("RGB", (40 + i, 40), (30 * i, 90, 200)).save(images / f"{i}.png")
    (images / f"{i}.txt").write_text(f"picture {i}")
pack_folder(images, Path("shards"))

trainer = Trainer(
    accelerator="cpu", max_steps=2, max_epochs=-1, enable_progress_bar=False, log_every_n_steps=1,
    callbacks=[
        AdapterCheckpoint(every_n_train_steps=2), AdapterEMA(), SampleImages(["picture 1"], 2, num_inference_steps=2)
    ],
)
module = LoraDiffusion(StableDiffusion("embedded"), LoraConfig(r=4, lora_alpha=4), base_dtype="float32")
trainer.fit(module, WebDatasetDataModule("shards", val_samples=2, batch_size=2, resolution=32, num_workers=1))
assert trainer.global_step == 2
[adapter] = Path(trainer.log_dir).glob("checkpoints/*2.adapter")
assert sorted(p.name for p in adapter.iterdir()) == [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
]
print("trained two steps with", Path(lit_lora.__file__).parent)
"""


def make_project(folder: Path) -> Path:
    """Write the project; returns its main file."""
    for package in ("callbacks", "datamodules"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("OURS = True\n")
    (folder / "main.py").write_text(MAIN)
    return folder / "main.py"


if __name__ == "__main__":
    project = Path(sys.argv[1])
    make_project(project)
    sys.exit(subprocess.run([sys.executable, "main.py"], cwd=project).returncode)
