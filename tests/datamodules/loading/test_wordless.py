from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from lit_lora.datamodules import WebDatasetDataModule
from lit_lora.datamodules.loading.wordless import WordlessCaptions
from lit_lora.datamodules.packing.pack import pack_folder

TOLD = r"none of the first 100 captions has words, so that the model learns nothing of them; if that is not meant, look"


def test_captions_without_words_are_told_once(recwarn: pytest.WarningsRecorder) -> None:
    captions = WordlessCaptions()
    for _ in range(9):
        captions.count({"caption": ["", " \n"] * 5})
    captions.count({"key": ["no captions"]})
    assert not recwarn.list
    with pytest.warns(UserWarning, match=TOLD):
        captions.count({"caption": ["\t"] * 10})
    captions.count({"caption": [""] * 100})
    assert not recwarn.list


def test_one_caption_with_words_is_enough(recwarn: pytest.WarningsRecorder) -> None:
    captions = WordlessCaptions()
    captions.count({"caption": ["", "a star"]})
    captions.count({"caption": [""] * 1000})
    assert not recwarn.list


class Takes(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(torch.ones(1, 32)).sum()


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_the_datamodule_tells_over_several_passes(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(10):
        Image.new("RGB", (20, 20), (20 * number, 0, 90)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(" \n")
    pack_folder(images, tmp_path / "shards")
    data = WebDatasetDataModule(str(tmp_path / "shards"), batch_size=5, resolution=16, num_workers=0)
    options = trainer_options | {"max_epochs": 10, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}
    with pytest.warns(UserWarning, match=TOLD):
        Trainer(**options).fit(Takes(), datamodule=data)
