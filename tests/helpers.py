"""Helpers that several test files share."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from filelock import FileLock
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from peft import PeftConfig, PeftModel
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.fresh_processes import ProcessError, run_processes
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.formats import write_adapter
from lit_lora.formats.of_family import files_of
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import Dense
from lit_lora.quantization.frozen_layer import can_freeze, freeze_layer
from tests.warm_python import WarmPython


def tiny_unet() -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's kind with random weights, for latents of 8 x 8."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_batches(count: int, batch_size: int = 2, size: int = 16, seed: int = 3) -> list[dict[str, Any]]:
    """Batches of random images, as a datamodule provides them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, size, size)
    return [
        {
            "pixel_values": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
            "caption": [f"a red {name} on white" for name in ("seven", "star", "heart", "two")[:batch_size]],
            "original_size": torch.tensor([[20 + number, 24]] * batch_size),
            "crop_top_left": torch.tensor([[1, number]] * batch_size),
            "weight": torch.ones(batch_size),
            "slot": list(range(number * batch_size, (number + 1) * batch_size)),
            "key": [f"{number}-{i}" for i in range(batch_size)],
        }
        for number in range(count)
    ]


def loader_of(batches: list[dict[str, Any]]) -> DataLoader[Any]:
    """A dataloader that gives ready-made batches in order."""
    return DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def diffusion_module(base: Path, adapter: PeftConfig, **options: Any) -> LoraDiffusion:
    """A module over a Stable Diffusion pipeline in float32, with AdamW at a rate at which few steps change much."""
    torch.manual_seed(0)
    module = LoraDiffusion(StableDiffusion(str(base)), adapter, base_dtype="float32", **options)
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    return module


def save_adapter(family: ModelFamily, folder: Path) -> None:
    """Write the family's adapter in every format that can hold it."""
    write_adapter(files_of(family, family.adapted.tensors(), family.new_token_rows()), folder)


def freeze_remaining(model: nn.Module) -> None:
    """Make every Linear and Conv2d layer that is none yet a frozen layer with its weight as it is."""
    for layer in model.modules():
        if can_freeze(layer):
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            freeze_layer(layer, Dense(), weight.detach(), weight.dtype)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of the test workers that comes here makes for all of them.

    If a process crashes in native code, the folder is made a second time: about once in twenty runs of all tests, gloo's thread
    of a process with FSDP2 finds its heap damaged, while neither glibc's malloc checks nor hundreds of repetitions show by what.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        for is_last in (False, True):
            if (folder / "done").exists():
                break
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                make(folder)
            except ProcessError as error:
                if is_last or not error.crashed:
                    raise
                print(f"a second trial, since {error}", file=sys.stderr)
            else:
                (folder / "done").touch()
    return folder


def processes(arguments: Sequence[object], count: int, folder: Path, timeout: float = 1200) -> None:
    """Run Python with the same arguments in several processes on the CPU, as under torchrun, which import nothing anew.

    Args:
        arguments: The script, or ``-m`` and a module, with its arguments.
        count: Number of processes.
        folder: Folder for the files with the processes' output and errors.
        timeout: Seconds after which all processes are killed.

    Raises:
        ProcessError: If a process fails.
        RuntimeError: If all processes together take longer than ``timeout``.
    """
    environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    run_processes([str(argument) for argument in arguments], count, folder, timeout, environment, WarmPython)


class Classifier(LightningModule):
    """A module of another project, for the images of :func:`make_batches`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch["pixel_values"].float() / 255), torch.tensor([0, 1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def difference_in_plain_libraries(denoiser: nn.Module, base: Path, adapter: Path) -> tuple[float, float, float]:
    """How far outputs of an adapted UNet are from those of the adapter's files in diffusers and in PEFT, and from the base's.

    Args:
        denoiser: The UNet with its adapter, of the kind of :func:`tiny_unet`.
        base: Folder of the base.
        adapter: Folder of the adapter's files.
    """
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 77, 16))

    def pipeline() -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(base)

    with torch.no_grad():
        here = denoiser(*inputs).sample
        plain = pipeline()
        of_base = plain.unet(*inputs).sample
        plain.load_lora_weights(adapter)
        in_diffusers = plain.unet(*inputs).sample
        in_peft = PeftModel.from_pretrained(pipeline().unet, adapter)(*inputs).sample
    first, second, third = (float((here - other).abs().max()) for other in (in_diffusers, in_peft, of_base))
    return first, second, third


def contents_of_shards(folder: Path) -> dict[str, bytes]:
    """The members of all tar files in a folder, by name."""
    contents: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            contents |= {member.name: cast(IO[bytes], archive.extractfile(member)).read() for member in archive}
    return contents


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, writing fails after this many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def differences(got: Any, expected: Any, place: str = "") -> Iterator[str]:
    """Places at which nested containers differ, with tensors compared bit for bit."""
    if isinstance(expected, dict) and isinstance(got, dict):
        yield from (f"{place}/{name} is lost" for name in expected.keys() - got.keys())
        yield from (f"{place}/{name} is left over" for name in got.keys() - expected.keys())
        for name in expected.keys() & got.keys():
            yield from differences(got[name], expected[name], f"{place}/{name}")
    elif isinstance(expected, list | tuple) and isinstance(got, list | tuple) and len(got) == len(expected):
        for number, pair in enumerate(zip(got, expected, strict=True)):
            yield from differences(*pair, f"{place}/{number}")
    elif isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        if not torch.equal(got, expected):
            yield f"{place} differs"
    elif got != expected:
        yield f"{place} is {got!r:.200} and should be {expected!r:.200}"


class ImageLogger(CSVLogger):
    """A logger with ``log_image``, as that of Weights & Biases."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: list[tuple[str, tuple[int, int], int]] = []

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        self.images += [(key, image.size, step) for image in images]
