"""Two custom data sources: a kind of sample in WebDataset shards, and a datamodule that needs no shards.

With this file on PYTHONPATH, a config names the first as a decoder:

    data:
      class_path: WebDatasetDataModule
      init_args:
        train_shards: shards
        decoder:
          class_path: my_data.ArrayImages
          init_args: {random_flip: true}

and the second as the datamodule:

    data:
      class_path: my_data.ImageFolder
      init_args: {folder: my_images, resolution: 512}
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import center_crop, horizontal_flip, pil_to_tensor, resize

from lit_lora import BadSampleError, SampleDecoder, UserError
from lit_lora.draws import seed_of


@dataclass(frozen=True)
class ArrayImages(SampleDecoder):
    """Images as NumPy arrays, uint8 ``(H, W, 3)`` in a ``.npy`` member, with a list of tags in a ``.json`` member.

    The image is resized until it covers the planned size, and its middle is kept. The caption is the tags, joined by commas.

    Args:
        random_flip: Mirror half of the training images left to right; off by default.
    """

    random_flip: bool = False
    _seed: int = 0  # the underscore keeps it out of the config: with_seed sets it

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        return {"image": ("npy",), "tags": ("json",)}

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        try:
            array = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
            tags = json.loads(members["json"])["tags"]
        except (ValueError, KeyError, EOFError) as error:
            raise BadSampleError(f"the array or the tags cannot be read ({error})") from error
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise BadSampleError(f"the array is {array.dtype} {array.shape}, not uint8 (H, W, 3)")
        pixels = fit(torch.from_numpy(array).permute(2, 0, 1), size)
        # The same sample in the same pass is flipped or not, whatever was drawn before.
        if self.random_flip and seed_of(self._seed, "flip", slot) % 2:
            pixels = horizontal_flip(pixels)
        return {"pixel_values": pixels, "caption": ", ".join(tags)}

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        return {"pixel_values": torch.zeros(3, *size, dtype=torch.uint8), "caption": ""}

    def with_seed(self, seed: int) -> Self:
        return replace(self, _seed=seed)

    def for_evaluation(self) -> Self:
        return replace(self, random_flip=False)


class ImageFolder(LightningDataModule):
    """Images of a folder with their captions, ``cat.jpg`` and ``cat.txt``, in the order of their names.

    Args:
        folder: Folder with the files.
        batch_size: Samples in a batch; defaults to 1.
        resolution: Side of the square images in pixels; defaults to 512.

    Raises:
        UserError: If the folder has no images with captions.
    """

    def __init__(self, folder: str, batch_size: int = 1, resolution: int = 512) -> None:
        super().__init__()
        captions = sorted(Path(folder).glob("*.txt"))
        self.pairs = [(image, text) for text in captions if (image := text.with_suffix(".jpg")).exists()]
        if not self.pairs:
            raise UserError(f"{folder} holds no .jpg with a .txt of the same name")
        self.batch_size = batch_size
        self.resolution = resolution

    def image_sizes(self) -> list[tuple[int, int]]:
        """Every height and width of a batch; ``LoraDiffusion`` checks them before it loads the base."""
        return [(self.resolution, self.resolution)]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_Pairs(self.pairs, self.resolution), self.batch_size)


class _Pairs(Dataset[dict[str, Any]]):
    def __init__(self, pairs: list[tuple[Path, Path]], resolution: int) -> None:
        self.pairs = pairs
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, text = self.pairs[index]
        pixels = fit(pil_to_tensor(Image.open(image).convert("RGB")), (self.resolution, self.resolution))
        return {"pixel_values": pixels, "caption": text.read_text(encoding="utf-8").strip()}


def fit(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of an image, ``(3, H, W)``, after it was resized until it covers ``size``: ``(3, *size)``."""
    scale = max(size[0] / pixels.shape[1], size[1] / pixels.shape[2])
    covering = [max(wanted, round(scale * given)) for wanted, given in zip(size, pixels.shape[1:], strict=True)]
    return center_crop(resize(pixels, covering, antialias=True), list(size))
